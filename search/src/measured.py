"""What a search measured of every head: a file beside the plan, for pictures and tables, that no kernel reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder, parse_order
from diffsparse.plan import SparsityPlan
from diffsparse.saving import write_whole
from diffsparse.search.errors import BadInput

__all__ = ["ATTENTION_NAME", "HeadFigures", "PooledAttention", "figures_beside", "fitting_attention", "plan_digest"]

ATTENTION_NAME = "attention.safetensors"


def plan_digest(plan: SparsityPlan) -> str:
    """Sixteen hexadecimal digits that name what a plan does, whatever its record says."""
    # Without the digest of the bitmaps: plans of before had none, and their figures belong to them still.
    files = replace(plan, record={}).to_files(bound=False)
    return hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class HeadFigures:
    """Of the entries that a search chose, float ``[phases, layers, heads]``. Raises ``ValueError`` for what cannot be.

    ``error``: predicted ``||O_sparse - O_dense||^2 / ||O_dense||^2`` of the head's output through the output
    projection, over the phase's steps, each with the weight that it has for the final latent. 0 where all is computed,
    1 where the head is left out. ``kept_mass``: share of the attention weights that is computed exactly, text counted;
    mean over the phase's traced steps and prompts. ``plan``: the digest of the plan that they belong to.
    """

    error: np.ndarray
    kept_mass: np.ndarray
    plan: str

    def __post_init__(self) -> None:
        for name, most in (("error", np.inf), ("kept_mass", 1.0)):
            values = getattr(self, name)
            if values.ndim != 3 or values.shape != self.error.shape:
                raise ValueError(f"{name} is not an array of phases, layers and heads: {values.shape}")
            if not (np.isfinite(values).all() and (values >= 0).all() and (values <= most).all()):
                raise ValueError(f"{name} holds a value that is out of range")


class PooledAttention:
    """The search's pooled attention, and its figures of the heads where the file has them.

    ``pooled``: float ``[phases, layers, heads, m, m]``, one row a bin of queries; the bins are runs of about equally
    many blocks of ``block_size`` tokens on ``grid``, in the order ``orders[layer][head]``.
    """

    def __init__(
        self,
        pooled: np.ndarray,
        orders: dict[str, list[TokenOrder]],
        grid: TokenGrid,
        block_size: int,
        figures: HeadFigures | None = None,
    ) -> None:
        self.pooled, self.orders, self.grid, self.block_size = pooled, orders, grid, block_size
        self.figures = figures

    def save(self, folder: str | Path) -> Path:
        """Write the file into a plan's folder, whole or not at all.

        Maps take a byte a bin: of the square root, relative to the map's peak, so that faint bins are told apart too.
        """
        from safetensors.numpy import save

        # In C order: safetensors writes memory as it lies, whatever the strides.
        peak = self.pooled.max(axis=(3, 4), keepdims=True).astype(np.float32, order="C")
        root = np.sqrt(self.pooled / np.where(peak > 0, peak, 1))
        arrays = {"pooled": np.rint(255 * root).astype(np.uint8, order="C"), "peak": peak}
        about = {
            "grid": ",".join(map(str, self.grid.shape)),
            "block_size": str(self.block_size),
            "orders": json.dumps({layer: [str(o) for o in row] for layer, row in self.orders.items()}),
            "phases": str(self.pooled.shape[0]),
        }
        if self.figures is not None:
            for name in ("error", "kept_mass"):
                arrays[name] = getattr(self.figures, name).astype(np.float32, order="C")
            about["plan"] = self.figures.plan
        file = Path(folder) / ATTENTION_NAME
        return write_whole(file, save(arrays, metadata=about))

    @classmethod
    def beside(cls, folder: str | Path | None) -> PooledAttention | None:
        """What is in a plan's folder, or None. Raises :class:`BadInput` where it cannot be read."""
        file = Path(folder) / ATTENTION_NAME if folder is not None else None
        if file is None or not file.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="numpy") as stored:
                about = stored.metadata() or {}
                pooled = stored.get_tensor("pooled")
                if pooled.dtype == np.uint8:
                    pooled = np.square(pooled / np.float32(255)) * stored.get_tensor("peak")
                pooled = pooled.astype(np.float32)  # files of before were in half precision
                figures = None
                if "plan" in about:
                    error, kept = (stored.get_tensor(name).astype(np.float32) for name in ("error", "kept_mass"))
                    figures = HeadFigures(error, kept, about["plan"])
            orders = {layer: [parse_order(o) for o in row] for layer, row in json.loads(about["orders"]).items()}
            return cls(pooled, orders, TokenGrid.parse(about["grid"]), int(about["block_size"]), figures)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise BadInput(f"{file} cannot be read ({error}); delete it to draw the plan without it") from None

    def figures_of(self, plan: SparsityPlan) -> HeadFigures | None:
        """The figures of the heads, or None where there are none or they are of another plan."""
        found = self.figures
        if found is None or found.error.shape != plan.index.shape or found.plan != plan_digest(plan):
            return None
        return found


def figures_beside(plan: SparsityPlan, folder: str | Path | None, grid: TokenGrid | None = None) -> HeadFigures | None:
    """The figures that a search recorded of a plan's heads, or None; ``grid``: where the plan is shown on one.

    On another grid the errors are others. Raises :class:`BadInput` for a file that cannot be read.
    """
    found = PooledAttention.beside(folder)
    if found is None or (grid is not None and found.grid.shape != grid.shape):
        return None
    return found.figures_of(plan)


def fitting_attention(plan: SparsityPlan, grid: TokenGrid, folder: str | Path | None) -> PooledAttention | None:
    """The measured attention beside a plan, or None: what is of another grid or other layers says nothing here."""
    found = PooledAttention.beside(folder)
    if found is None or found.grid.shape != grid.shape or found.block_size != plan.block_size:
        return None
    shape, heads = found.pooled.shape, plan.index.shape[2]
    square = len(shape) == 5 and shape[:3] == plan.index.shape and shape[3] == shape[4] > 0
    ordered = all(len(found.orders.get(layer, ())) == heads for layer in plan.layers)
    return found if square and ordered else None
