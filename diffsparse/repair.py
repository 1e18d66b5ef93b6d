"""An affine correction of what sparse heads put out, fitted offline to what they get wrong.

What a sparse head leaves out is largely a linear function of what it puts out: the output ``O`` of a head becomes
``O + O W + b``. Each phase, layer and head has a map of its own. Text queries are exact, so that only visual ones are
corrected. ``diffsparse.online`` has the form that is fitted in every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffsparse.messages import shown
from diffsparse.online import OnlineRepair
from diffsparse.tokens import HeadSelection, take_heads
from diffsparse.typed import PlanError

__all__ = ["REPAIR_KEY", "HeadRepair", "Repair", "read_repair"]

#: The key in a plan's JSON, and the beginning of its arrays' names.
REPAIR_KEY = "repair"
# Head dims of models are at most a few hundred.
_MAX_DIM = 1024


@dataclass(frozen=True, eq=False)
class HeadRepair:
    """The maps of one layer's heads.

    weight: ``[H, D, D]``; bias: ``[H, D]``; or ``[B, H, D, D]`` and ``[B, H, D]``, of each item of a batch.
    used: bool ``[H]``, False for a head that has no map and stays as it is, whatever weight and bias hold for it.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    used: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All three, in the order of the arguments."""
        return self.weight, self.bias, self.used

    def to(self, device: torch.device | str) -> HeadRepair:
        """The same on ``device``."""
        return HeadRepair(*(x.to(device) for x in self.tensors))

    def heads(self, selection: HeadSelection) -> HeadRepair:
        """The maps of some heads."""
        return HeadRepair(*(take_heads(x, selection) for x in self.tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in self.tensors)

    def apply_(self, out: torch.Tensor, text_before: int, num_visual: int) -> torch.Tensor:
        """Correct the visual tokens of ``out``, ``[B, S, H, D]``, in place; returns ``out``.

        Plain torch, which goes through memory several times: :func:`diffsparse.kernels.repair.mend_` has it in one.
        """
        visual = out.narrow(1, text_before, num_visual).transpose(1, 2)
        change = visual @ self.weight.to(out.dtype)
        change.add_(self.bias.to(out.dtype).unsqueeze(-2))
        visual += change.masked_fill_(~self.used[:, None, None], 0)
        return out


@dataclass(frozen=True, eq=False)
class Repair:
    """The maps of a plan.

    ``index``: int32 ``[phases, layers, heads]``: the map of each head, -1 for none.
    ``left``: float16 ``[N, D, D]``, the maps' matrices; or ``[N, D, R]`` where there is ``right``, float16
        ``[N, R, D]``: their product is the matrix.
    ``bias``: float16 ``[N, D]``.
    """

    index: np.ndarray
    left: np.ndarray
    bias: np.ndarray
    right: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.index.ndim != 3 or self.index.dtype != np.int32:
            raise PlanError(f"a repair's index is int32 [phases, layers, heads], got {_form(self.index)}")
        n, dim = self.bias.shape if self.bias.ndim == 2 else (-1, -1)
        if n < 1 or not 1 <= dim <= _MAX_DIM:
            raise PlanError(f"a repair's bias is float16 [maps, head_dim], got {_form(self.bias)}")
        rank = dim if self.right is None else self.right.shape[1] if self.right.ndim == 3 else 0
        wanted = {"left": (self.left, (n, dim, rank)), "bias": (self.bias, (n, dim))}
        if self.right is not None:
            wanted["right"] = (self.right, (n, rank, dim))
        for name, (array, shape) in wanted.items():
            if array.shape != shape or array.dtype != np.float16:
                raise PlanError(f"a repair's {name} is float16 {shown(list(shape))}, got {_form(array)}")
            if not np.isfinite(array).all():
                raise PlanError(f"a repair's {name} has values that are not finite")
        if rank < 1 or self.index.min(initial=0) < -1 or self.index.max(initial=-1) >= n:
            raise PlanError(f"a repair's index names one of its {n} maps for every head, or -1")

    @property
    def num_heads(self) -> int:
        """How many heads have a map, over all phases and layers."""
        return int((self.index >= 0).sum())

    @property
    def head_dim(self) -> int:
        """``D``."""
        return int(self.bias.shape[1])

    @property
    def rank(self) -> int | None:
        """``R``, or None where matrices are kept whole."""
        return None if self.right is None else int(self.right.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.to_arrays().values())

    def of_layer(self, phase: int, layer: int) -> HeadRepair:
        """The maps of a layer's heads in a phase, float16 on the CPU."""
        places = self.index[phase, layer]
        matrix = self.left[places].astype(np.float32)
        if self.right is not None:
            matrix = matrix @ self.right[places].astype(np.float32)
        none = places < 0
        matrix[none] = 0
        bias = np.where(none[:, None], np.float16(0), self.bias[places])
        return HeadRepair(torch.from_numpy(matrix.astype(np.float16)), torch.from_numpy(bias), torch.from_numpy(~none))

    def to_parts(self) -> dict[str, np.ndarray]:
        """The arrays, by the names of the arguments."""
        found = {"index": self.index, "left": self.left, "bias": self.bias}
        if self.right is not None:
            found["right"] = self.right
        return {name: np.ascontiguousarray(array) for name, array in found.items()}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The arrays of a plan's file, by name."""
        return {f"{REPAIR_KEY}.{name}": array for name, array in self.to_parts().items()}

    def to_dict(self) -> dict[str, Any]:
        """What a plan's JSON says of it."""
        return {"kind": "affine", "maps": int(self.bias.shape[0]), "rank": self.rank}


def read_repair(data: Any, arrays: Mapping[str, np.ndarray]) -> Repair | OnlineRepair | None:
    """The repair that a plan's JSON announces, from its arrays. Raises :class:`PlanError`."""
    if data is None:
        return None
    if isinstance(data, dict) and data.get("kind") == "online":
        if set(data) != {"kind", "rows"}:
            raise PlanError(f"{REPAIR_KEY} of kind 'online' must have rows and nothing else; got {shown(data)}")
        return OnlineRepair(data["rows"])
    if not isinstance(data, dict) or set(data) != {"kind", "maps", "rank"}:
        raise PlanError(f"{REPAIR_KEY} must have kind, maps and rank; got {shown(data)}")
    if data["kind"] != "affine":
        raise PlanError(f"{REPAIR_KEY}.kind must be 'affine' or 'online', got {shown(data['kind'])}; update diffsparse")
    names = ["index", "left", "bias"] + ([] if data["rank"] is None else ["right"])
    if lacking := [name for name in names if f"{REPAIR_KEY}.{name}" not in arrays]:
        raise PlanError(f"the plan's arrays lack {REPAIR_KEY}.{lacking[0]}; copy the whole folder")
    found = Repair(**{name: arrays[f"{REPAIR_KEY}.{name}"] for name in names})
    if found.to_dict() != data:
        raise PlanError(f"{REPAIR_KEY} says {shown(data)}, its arrays have {shown(found.to_dict())}")
    return found


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
