"""The sparsity plan: which entry every head runs in every phase, when, and for which model; and its file format.

A plan is a folder or a Hub repository with ``sparse_plan.json``, ``sparse_plan.safetensors`` where a pattern is a
bitmap or heads have a repair, and a generated ``README.md`` card. No pickle, no YAML.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffsparse.architecture import Architecture
from diffsparse.codec import PlanError, encode_entry, encode_schedule
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.messages import one_line, shown
from diffsparse.online import OnlineRepair
from diffsparse.provenance import check_record
from diffsparse.reader import FORMAT_VERSION, read_files, read_plan
from diffsparse.repair import REPAIR_KEY, Repair
from diffsparse.reuse import computed_steps, stretches
from diffsparse.saving import ARRAYS_NAME, CARD_NAME, DIGEST_KEY, JSON_NAME, arrays_digest, write_plan
from diffsparse.schedule import Schedule
from diffsparse.selection import OnlineSelection
from diffsparse.tokens import BLOCK_SIZES
from diffsparse.work import head_work

__all__ = ["FORMAT_VERSION", "Architecture", "PlanError", "SparsityPlan"]

ANY_LAYER = "*"


@dataclass(frozen=True, eq=False)
class SparsityPlan:
    """``(phase, layer, head) -> HeadEntry``, a schedule, and where it all came from.

    ``entries``: the distinct entries. ``index``: int ``[phases, layers, heads]`` into them.
    ``layers``: names for the middle axis. A plan for any model has the one layer ``"*"`` and one head.
    ``record``: provenance as JSON values (kernel and version, calibration, quality, environment); no number of the
    output depends on it.
    ``repair``: what the outputs of heads are corrected by: maps that were fitted for them (``diffsparse.repair``), or
    how they are fitted in every call (``diffsparse.online``), or None.
    """

    entries: tuple[HeadEntry, ...]
    index: np.ndarray
    layers: tuple[str, ...] = (ANY_LAYER,)
    schedule: Schedule = field(default_factory=Schedule)
    block_size: int = 64
    architecture: Architecture | None = None
    record: dict[str, Any] = field(default_factory=dict)
    repair: Repair | OnlineRepair | None = None
    # Densities of entries on grids: a plan of many bitmaps is asked for them again and again.
    _known: dict[tuple[HeadEntry, TokenGrid], float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        index = self.index
        if index.ndim != 3 or not np.issubdtype(index.dtype, np.integer):
            raise PlanError(f"index must be integers [phases, layers, heads], got {index.dtype} {index.shape}")
        if index.shape[:2] != (self.schedule.num_phases, len(self.layers)):
            raise PlanError(
                f"index is {index.shape}, the plan has {self.schedule.num_phases} phases and {len(self.layers)} layers"
            )
        if index.size == 0 or not self.entries or index.min() < 0 or index.max() >= len(self.entries):
            raise PlanError(f"index must name one of the plan's {len(self.entries)} entries for every head")
        if len(set(self.layers)) != len(self.layers):
            raise PlanError("a layer is named twice")
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise PlanError(f"block_size must be one of {BLOCK_SIZES}, got {shown(self.block_size)}")
        if self.is_uniform and index.shape[2] != 1:
            raise PlanError(f"a plan for any model has one head for all of them, got {index.shape[2]}")
        if self.architecture is not None and not self.is_uniform:
            if index.shape[2] != self.architecture.heads:
                raise PlanError(f"index has {index.shape[2]} heads, the architecture {self.architecture.heads}")
            if lacking := [n for n in self.layers if n not in self.architecture.layers]:
                raise PlanError(f"the plan has entries for {shown(lacking[0])}, but its architecture has no such layer")
        if self.repair is not None and not isinstance(self.repair, (Repair, OnlineRepair)):
            raise PlanError(f"repair must be a Repair, an OnlineRepair or None, got {shown(self.repair)}")
        if (maps := self.fitted_repair) is not None:
            if self.is_uniform:
                raise PlanError(
                    "a plan for any model has no repair that is fitted to the heads of one; OnlineRepair serves any"
                )
            if maps.index.shape != index.shape:
                raise PlanError(f"the repair is for {maps.index.shape} phases, layers, heads, not {index.shape}")
            if self.architecture is not None and maps.head_dim != self.architecture.head_dim:
                raise PlanError(
                    f"the repair is for heads of {maps.head_dim}, the architecture has {self.architecture.head_dim}"
                )

    @classmethod
    def uniform(cls, *phase_entries: HeadEntry, schedule: Schedule | None = None, **kwargs: Any) -> SparsityPlan:
        """One entry per phase for every layer and head of any model (one entry serves all phases)."""
        schedule = schedule or Schedule()
        chosen = list(phase_entries) * schedule.num_phases if len(phase_entries) == 1 else list(phase_entries)
        entries = tuple(dict.fromkeys(chosen))
        index = np.array([entries.index(e) for e in chosen]).reshape(-1, 1, 1)
        return cls(entries=entries, index=index, schedule=schedule, **kwargs)

    @classmethod
    def from_table(cls, table: Mapping[str, Sequence[Sequence[HeadEntry]]], **kwargs: Any) -> SparsityPlan:
        """Build from ``{layer: [phase][head] -> entry}``."""
        layers = tuple(table)
        entries = tuple(dict.fromkeys(e for phases in table.values() for heads in phases for e in heads))
        lookup = {entry: i for i, entry in enumerate(entries)}
        index = np.array([[[lookup[e] for e in heads] for heads in table[name]] for name in layers]).transpose(1, 0, 2)
        return cls(entries=entries, index=index, layers=layers, **kwargs)

    @property
    def tails(self) -> set[str]:
        """The tails that its heads have, ``none`` left aside."""
        return {entry.execution.tail for entry in self.entries} - {"none"}

    @property
    def fitted_repair(self) -> Repair | None:
        """The repair, where it is one of maps that were fitted for the plan's heads."""
        return self.repair if isinstance(self.repair, Repair) else None

    @property
    def online_repair(self) -> OnlineRepair | None:
        """The repair, where it is fitted in every call."""
        return self.repair if isinstance(self.repair, OnlineRepair) else None

    def with_numerics(self, numerics: str) -> SparsityPlan:
        """The same plan in other numerics (``auto``, ``int8`` or ``fp8``: see ``Execution``).

        Heads that attend everything, that are left out, or that have the tail ``moments`` stay as they are. What a
        device has no 8 bits for runs in the precision of the model.
        """

        def changed(entry: HeadEntry) -> HeadEntry:
            how = entry.execution
            if numerics != "auto" and (entry.is_dense or how.mode == "skip" or how.tail == "moments"):
                return entry
            return replace(entry, execution=replace(how, numerics=numerics))

        wanted = [changed(entry) for entry in self.entries]
        entries = tuple(dict.fromkeys(wanted))
        place = np.array([entries.index(entry) for entry in wanted], self.index.dtype)
        return replace(self, entries=entries, index=place[self.index])

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def is_uniform(self) -> bool:
        """True for a plan that serves any model."""
        return self.layers == (ANY_LAYER,)

    def layer_entries(self, phase: int, layer: str, heads: int) -> tuple[HeadEntry, ...] | None:
        """The entries of one layer's heads, or None where the layer runs dense (not in the plan, or a dense layer)."""
        if layer in self.schedule.dense_layers:
            return None
        if self.is_uniform:
            return (self.entries[self.index[phase, 0, 0]],) * heads
        if layer not in self.layers:
            return None
        row = self.index[phase, self.layers.index(layer)]
        if len(row) != heads:
            raise PlanError(f"{layer}: the plan has entries for {len(row)} heads, the model has {heads}")
        return tuple(self.entries[i] for i in row)

    def layout(self, phase: int, layer: str, heads: int, grid: TokenGrid) -> BlockLayout | None:
        """One layer's block lists on a grid, with its repair, or None where the layer runs dense."""
        entries = self.layer_entries(phase, layer, heads)
        if entries is None:
            return None
        found = build_layout(grid, entries, self.block_size)
        if self.repair is None:
            return found
        if isinstance(self.repair, OnlineRepair):
            return found.repaired(self.repair)
        return found.repaired(self.repair.of_layer(phase, self.layers.index(layer)))

    def call_densities(
        self, grid: TokenGrid, layers: Sequence[str] | None = None, heads: int | None = None
    ) -> np.ndarray:
        """Density of every sparse call, float ``[phases, layers]``, tails and an online repair counted; dense layers
        count 1.

        Of heads whose blocks are picked while the model runs (``rules``) the most that their budgets allow.
        ``layers`` and ``heads`` default to the architecture's; a plan for any model without either is one layer.
        """
        return self._densities(grid, layers, heads, None)

    def _densities(
        self, grid: TokenGrid, layers: Sequence[str] | None, heads: int | None, reuse: float | None
    ) -> np.ndarray:
        """The same; ``reuse``: what heads with this reuse add to it, or None for all that there is."""
        if layers is None:
            layers = self.architecture.layers if self.architecture else self.layers
        heads = heads or (self.architecture.heads if self.architecture else self.index.shape[2])
        result = np.full((self.schedule.num_phases, len(layers)), 1.0 if reuse is None else 0.0)
        for phase in range(self.schedule.num_phases):
            for i, layer in enumerate(layers):
                entries = self.layer_entries(phase, layer, heads)
                if entries is None:
                    continue
                counts = [reuse is None or entry.execution.reuse == reuse for entry in entries]
                result[phase, i] = np.mean([self._density(e, grid) if c else 0.0 for e, c in zip(entries, counts)])
        return result

    def _density(self, entry: HeadEntry, grid: TokenGrid) -> float:
        if (key := (entry, grid)) not in self._known:
            self._known[key] = head_work(entry, grid, self.block_size, self.online_repair).density
        return self._known[key]

    def trajectory_density(
        self,
        grid: TokenGrid,
        noise_levels: Iterable[float],
        layers: Sequence[str] | None = None,
        heads: int | None = None,
    ) -> float:
        """Work-weighted mean density over all self-attention calls of a generation with these noise levels."""
        return float(np.mean(self.step_densities(grid, noise_levels, layers, heads)))

    def step_densities(
        self,
        grid: TokenGrid,
        noise_levels: Iterable[float],
        layers: Sequence[str] | None = None,
        heads: int | None = None,
    ) -> np.ndarray:
        """Mean density of a step's calls, float ``[steps]``, for a generation with these descending noise levels.

        Steps without a phase count 1, outputs that are used again 0. Steps that follow each other at one level are one.
        """
        levels = list(noise_levels)
        phases = self.schedule.phases(levels)
        calls = np.append(self.call_densities(grid, layers, heads).mean(1), 1.0)
        result = calls[[-1 if phase is None else phase for phase in phases]]
        for reuse in {entry.execution.reuse for entry in self.entries} - {0.0}:
            saved = self._densities(grid, layers, heads, reuse).mean(1)
            for phase, steps in stretches(phases):
                distinct, of = np.unique([-levels[i] for i in steps], return_inverse=True)
                computed = np.array(computed_steps((-distinct).tolist(), reuse))[of]
                result[steps] -= saved[phase] * ~computed
        return result

    @property
    def rules(self) -> tuple[OnlineSelection, ...]:
        """What picks blocks of its heads while a model runs, each once."""
        return tuple(dict.fromkeys(entry.online for entry in self.entries if entry.online is not None))

    @property
    def reuses(self) -> bool:
        """Whether any head's output is used again at later steps."""
        return any(entry.execution.reuse for entry in self.entries)

    @property
    def reused_heads(self) -> int:
        """How many heads' outputs are, over all phases and layers."""
        reused = np.array([entry.execution.reuse > 0 for entry in self.entries])
        return int(reused[self.index].sum())

    def carried(self, grid: TokenGrid) -> int:
        """How many distinct entries have a bitmap that was measured on another grid."""
        return sum(e.pattern.is_carried(grid, e.order, self.block_size) for e in self.entries)

    def check_architecture(self, model: Architecture) -> list[str]:
        """Differences between the plan's model and this one; a plan for any model has none."""
        return self.architecture.differences(model) if self.architecture else []

    # -- files -----------------------------------------------------------------------------------------------------

    def to_files(self, *, bound: bool = True) -> dict[str, bytes]:
        """The plan's files by name. The same plan always gives the same bytes.

        ``bound``: the JSON has a digest of the bitmaps, so that those of another plan are refused.
        """
        arrays: dict[str, np.ndarray] = {}
        data: dict[str, Any] = {
            "format": "diffsparse.sparse_plan",
            "format_version": FORMAT_VERSION,
            "block_size": self.block_size,
            "architecture": None,
            "schedule": encode_schedule(self.schedule),
            "entries": [encode_entry(entry, arrays) for entry in self.entries],
            "layers": list(self.layers),
            # One line per layer keeps a plan of thousands of heads readable.
            "index": [[" ".join(map(str, row)) for row in phase] for phase in self.index.tolist()],
            "record": self.record,
        }
        if self.architecture:
            data["architecture"] = {**asdict(self.architecture), "fingerprint": self.architecture.fingerprint}
        if self.repair is not None:
            if isinstance(self.repair, Repair):
                arrays |= self.repair.to_arrays()
            data[REPAIR_KEY] = self.repair.to_dict()
        if arrays and bound:
            # Versions that do not know the key can do without it.
            data |= {DIGEST_KEY: arrays_digest(arrays), "ignorable": [DIGEST_KEY]}
        try:
            text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise PlanError(f"the plan's record holds what JSON cannot: {error}") from error
        check_record(json.loads(json.dumps(self.record)))  # as it will be read: tuples are lists there
        files = {JSON_NAME: text.encode()}
        if arrays:
            from safetensors.numpy import save

            files[ARRAYS_NAME] = save(arrays)
        return files

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the plan's folder, with a card as its ``README.md``; returns the folder.

        A plan that was there is replaced as a whole. A save that is stopped halfway leaves the old plan, the new one,
        or one that :meth:`from_pretrained` refuses. A ``README.md`` that diffsparse did not write stays as it is.
        """
        from diffsparse.card import plan_card

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_plan(path, self.to_files(), plan_card(self))
        return path

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> SparsityPlan:
        """Read a plan from a folder or a Hub repository. Raises :class:`PlanError` with what is wrong."""
        path = Path(name_or_path)
        try:
            if path.is_file() and path.name == JSON_NAME:
                path = path.parent
            found = path.is_dir()
        except OSError as error:  # a name that is too long, or a folder that may not be entered
            raise PlanError(f"{shown(str(name_or_path))} cannot be read: {error.strerror}") from error
        if not found:
            path = _download(str(name_or_path), revision, token)
        content, arrays = read_files(path)
        return cls.from_json(content, arrays, source=str(path / JSON_NAME))

    @classmethod
    def from_json(
        cls, content: bytes, arrays: dict[str, np.ndarray] | None = None, source: str = "the plan"
    ) -> SparsityPlan:
        """Read the bytes of a ``sparse_plan.json`` and its arrays. Raises :class:`PlanError` with what is wrong."""
        try:
            return cls(**read_plan(content, arrays or {}))
        except PlanError as error:
            raise PlanError(f"{one_line(source, 120)}: {one_line(str(error))}") from error

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the plan's folder to a Hub repository, made if it is not there; returns the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            if api.file_exists(repo.repo_id, CARD_NAME):  # one that somebody wrote is not replaced
                shown = api.hf_hub_download(repo.repo_id, CARD_NAME)
                (Path(folder) / CARD_NAME).write_bytes(Path(shown).read_bytes())
            self.save_pretrained(folder)
            return str(
                api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Upload sparsity plan")
            )


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, token=token, allow_patterns=["sparse_plan.*", CARD_NAME])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanError(
            f"{shown(repo_id)} is neither a folder nor a plan on the Hub that can be read: {one_line(reason, 200)}"
        ) from error
