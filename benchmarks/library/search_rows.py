"""What a benchmark of searches found, and what follows from it for a model of more layers."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from diffsparse.search.stages import sensitivity

__all__ = ["ALL", "Row", "extrapolated", "groups", "read", "write"]

#: The stage of the row that tells of a whole search, the last one of each.
ALL = "all"
_NUMBERS = ("seconds", "step_seconds", "estimate_seconds", "host_gb", "disk_gb", "gpu_gb", "dense_gpu_gb")


@dataclass
class Row:
    """One stage of a search, or all of it. Seconds; GB at most.

    host_gb: beside the model. disk_gb: of the record while it is written, journal included. gpu_gb: all that is held;
    dense_gpu_gb: the same of a dense generation.
    """

    model: str
    layers: int
    tokens: int
    stage: str
    seconds: float
    step_seconds: float = 0.0
    estimate_seconds: float = 0.0
    estimate_after_seconds: float = 0.0
    host_gb: float = 0.0
    disk_gb: float = 0.0
    gpu_gb: float = 0.0
    dense_gpu_gb: float = 0.0
    status: str = "ok"

    @property
    def failed(self) -> bool:
        """Whether the search was not run to its end, or stands for one that was not."""
        return self.status != "ok" and not self.status.startswith("extrapolated")


def groups(layers: int, step: float) -> int:
    """Groups of layers that are perturbed one after another in a model whose dense step takes so many seconds."""
    slow = sensitivity.MOST_GROUPS * 2 * step > sensitivity.GROUPS_SECONDS
    return min(layers, sensitivity.FEWER_GROUPS if slow else sensitivity.MOST_GROUPS)


def extrapolated(few: list[Row], more: list[Row], layers: int) -> list[Row]:
    """Rows of the whole model from those of two with fewer layers: each further layer adds as much as those between.

    What does not grow, as the compilation of kernels, stays as it is. In ``sensitivity`` all layers run once
    for each group of layers.
    """
    first, second = few[-1], more[-1]
    status = f"extrapolated from {first.layers} and {second.layers} layers"
    if first.failed or second.failed:
        status = f"failed with {(first if first.failed else second).layers} layers"
    counts = (first.layers, second.layers, layers)
    step = _line(counts, first.step_seconds, second.step_seconds)
    runs = tuple(n * groups(n, step) for n in counts)
    known = {row.stage: row for row in few}
    found = []
    for row in more:
        other = known.get(row.stage, replace(row, seconds=0.0))
        whole = replace(row, layers=layers, status=status)
        for name in _NUMBERS:
            at = runs if (row.stage, name) == ("sensitivity", "seconds") else counts
            setattr(whole, name, _line(at, getattr(other, name), getattr(row, name)))
        found.append(whole)
    everything = found[-1]
    everything.seconds = sum(row.seconds for row in found[:-1])
    # In few layers another stage may take the most memory than in all of them.
    everything.gpu_gb = max(row.gpu_gb for row in found[:-1])
    own = [2 * groups(n, step) * at for n, at in zip(counts, (first.step_seconds, second.step_seconds, step))]
    rest = _line(counts, first.estimate_seconds - own[0], second.estimate_seconds - own[1])
    everything.estimate_seconds = own[2] + rest
    return found


def _line(at: tuple[int, ...], first: float, second: float) -> float:
    """The value at the third place of a line through values at the first and the second; no line falls."""
    return max(first, second) + max(0.0, second - first) / (at[1] - at[0]) * (at[2] - at[1])


def write(path: Path, rows: list[Row]) -> None:
    """A table with a heading."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows)


def read(path: Path) -> list[Row]:
    """What :func:`write` wrote."""
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]
