"""What ran sparse, what ran dense, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from diffsparse.pipelines.family import find_transformers
from diffsparse.pipelines.state import ModelState, state_of

__all__ = ["LayerSummary", "SparseSummary", "TransformerSummary", "sparse_attention_summary"]


@dataclass(frozen=True)
class LayerSummary:
    """One layer so far.

    density: mean over its sparse calls. total_density: over all its calls. unseen_calls: forwards in which it made no
    attention call that can be seen: a cache skipped it, or its processor is from outside diffusers.
    sparse_ms, dense_ms: mean milliseconds of the calls that were timed (``timed_calls``); None where none was. On a GPU
    only with ``timing=True``, and the last calls are missing where the GPU has not ended them yet. pick_seconds: what
    picking blocks took in them, where a rule picks any; ``seconds`` has it too.
    """

    name: str
    sparse_calls: int
    dense_calls: int
    density: float | None
    total_density: float | None
    dense_reasons: dict[str, int]
    backends: dict[str, int]
    unseen_calls: int
    sparse_ms: float | None = None
    dense_ms: float | None = None
    timed_calls: int = 0
    seconds: float | None = None
    dense_kernels: dict[str, int] = field(default_factory=dict)
    pick_seconds: float | None = None


@dataclass(frozen=True)
class TransformerSummary:
    """One transformer so far.

    density: whole-trajectory density, the work-weighted mean over all self-attention calls executed, dense ones at 1;
        None before the first. call_density: the mean over sparse calls.
    grids: forwards on each grid. carried: bitmap heads that were measured elsewhere, on each grid that has any.
    skipped: layers that plan and model do not share (``strict=False``). repaired_heads: heads whose output the plan
        corrects, of all phases and layers. online_rows: exact rows of each sparse call, where the plan's repair is
        fitted in it. reused_heads: calls of a head that took an earlier step's output; reuse_bytes: the most memory
        that such outputs had; calls_without_projections: calls of layers whose heads all took one, so that q, k and v
        were not computed. rules: what picks blocks from q and k while the model runs; pick_bytes: the most memory that
        blocks had which serve several steps. races: with ``dense_backend="fastest"``, what was measured for each shape:
        the kernel that is fastest and the milliseconds of all that ran; race_excluded: why the others did not.
        shared: where several processes share the heads (context parallelism), which part this one has; all figures are
        of that part.
    """

    name: str
    model_class: str
    plan: str
    backend: str
    forwards: int
    density: float | None
    call_density: float | None
    work: float
    grids: dict[str, int]
    carried: dict[str, int]
    skipped: dict[str, str]
    layers: tuple[LayerSummary, ...]
    repaired_heads: int = 0
    online_rows: int | None = None
    reused_heads: int = 0
    reuse_bytes: int = 0
    calls_without_projections: int = 0
    rules: tuple[str, ...] = ()
    pick_bytes: int = 0
    dense_backend: str | None = None
    races: dict[str, str] = field(default_factory=dict)
    race_excluded: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: str = ""

    @property
    def dense_kernels(self) -> dict[str, int]:
        """Dense calls by the kernel that ran them, where ``dense_backend`` chose it; ``model`` is the model's own."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for name, count in layer.dense_kernels.items():
                total[name] = total.get(name, 0) + count
        return total

    @property
    def sparse_calls(self) -> int:
        """Sparse attention calls of all layers."""
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> int:
        """Dense attention calls of all layers."""
        return sum(layer.dense_calls for layer in self.layers)

    @property
    def dense_reasons(self) -> dict[str, int]:
        """Why calls ran dense, over all layers, most frequent first."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for reason, count in layer.dense_reasons.items():
                total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def seconds(self) -> float | None:
        """Time in the attention calls that were timed; None where none was."""
        timed = [layer.seconds for layer in self.layers if layer.seconds is not None]
        return sum(timed) if timed else None

    @property
    def pick_seconds(self) -> float | None:
        """Of that time, what picking blocks took; None where no rule picks any, or nothing was timed."""
        timed = [layer.pick_seconds for layer in self.layers if layer.pick_seconds is not None]
        return sum(timed) if timed else None

    @property
    def timed_calls(self) -> int:
        return sum(layer.timed_calls for layer in self.layers)

    @property
    def backends(self) -> dict[str, int]:
        """Sparse calls by the kernel that ran them."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for name, count in layer.backends.items():
                total[name] = total.get(name, 0) + count
        return total


@dataclass(frozen=True)
class SparseSummary:
    """All transformers of a pipeline that are enabled."""

    transformers: dict[str, TransformerSummary]

    @property
    def enabled(self) -> bool:
        """Whether sparse attention is enabled on any of them."""
        return bool(self.transformers)

    @property
    def density(self) -> float | None:
        """Whole-trajectory density so far, over all transformers; None before the first call."""
        ran = [t for t in self.transformers.values() if t.density is not None]
        work = sum(t.work for t in ran)
        return sum((t.density or 0.0) * t.work for t in ran) / work if work else None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        result: dict[str, Any] = {"enabled": self.enabled, "density": self.density, "transformers": {}}
        for name, t in self.transformers.items():
            totals = {
                "sparse_calls": t.sparse_calls,
                "dense_calls": t.dense_calls,
                "dense_reasons": t.dense_reasons,
                "backends": t.backends,
                "dense_kernels": t.dense_kernels,
                "timed_calls": t.timed_calls,
                "seconds": t.seconds,
                "pick_seconds": t.pick_seconds,
            }
            result["transformers"][name] = {**asdict(t), "layers": [asdict(x) for x in t.layers], **totals}
        return result

    def __str__(self) -> str:
        if not self.enabled:
            return "sparse attention is not enabled"
        lines = []
        for t in self.transformers.values():
            lines.append(f"{t.name} ({t.model_class}): {t.plan}; backend {t.backend}")
            lines.append(
                f"  {t.forwards} forwards: {t.sparse_calls} sparse attention calls (mean density "
                f"{_figure(t.call_density)}), {t.dense_calls} dense; whole-trajectory density {_figure(t.density)}"
            )
            for title, counts in (
                ("ran on", t.backends),
                ("dense because", _where(t)),
                ("dense calls ran on", t.dense_kernels),
                ("grids", t.grids),
                ("bitmaps carried over from another grid", t.carried),
            ):
                if counts:
                    lines.append(f"  {title}: " + ", ".join(f"{key} ({count})" for key, count in counts.items()))
            if t.shared:
                lines.append(f"  {t.shared}")
            if t.repaired_heads:
                lines.append(f"  heads whose output the plan repairs (of all phases): {t.repaired_heads}")
            if t.online_rows is not None:
                lines.append(f"  outputs are repaired online, by {t.online_rows} exact rows of each sparse call")
            for rule in t.rules:
                lines.append(f"  blocks are picked while the model runs: {rule}")
            if t.pick_bytes:
                lines.append(f"  picked blocks that serve several steps: at most {t.pick_bytes / 1e6:.1f} MB held")
            if t.reused_heads:
                lines.append(
                    f"  outputs used again over steps: {t.reused_heads} calls of heads, at most "
                    f"{t.reuse_bytes / 1e6:.1f} MB held"
                )
            if t.calls_without_projections:
                lines.append(f"  calls of layers that needed no q, k and v: {t.calls_without_projections}")
            lines += [f"  fastest dense attention for {shape}: {race}" for shape, race in t.races.items()]
            if t.seconds is not None:
                calls = t.sparse_calls + t.dense_calls
                of = f" ({t.timed_calls} of {calls} calls timed)" if t.timed_calls != calls else ""
                picking = "" if t.pick_seconds is None else f", {t.pick_seconds:.3f} s of it to pick blocks"
                lines.append(f"  time in attention: {t.seconds:.3f} s{picking}{of}")
            if unseen := sum(layer.unseen_calls for layer in t.layers):
                lines.append(f"  no attention call seen (skipped by a cache, or a foreign processor): {unseen}")
            lines += [f"  skipped {name}: {why}" for name, why in t.skipped.items()]
            lines += ["  " + line for line in _layer_table(t.layers)]
        return "\n".join(lines)


def _where(t: TransformerSummary) -> dict[str, int]:
    """Reasons for dense calls, with the number of layers where they do not hold for all."""
    named = {}
    for reason, count in t.dense_reasons.items():
        layers = sum(reason in layer.dense_reasons for layer in t.layers)
        named[reason if layers == len(t.layers) else f"{reason}, in {layers} of {len(t.layers)} layers"] = count
    return named


def _layer_table(layers: tuple[LayerSummary, ...]) -> list[str]:
    """One line a layer. The columns of times are there where a call was timed."""
    width = max([len("layer"), *(len(x.name) for x in layers)])
    ran_by = {x.name: "+".join(x.backends) or "-" for x in layers}
    by = max([len("backend"), *(len(name) for name in ran_by.values())])
    timed = any(x.timed_calls for x in layers)
    times = f" {'sparse ms':>10} {'dense ms':>10}" if timed else ""
    lines = [f"{'layer':<{width}} {'backend':<{by}} {'sparse':>7} {'dense':>7} {'density':>8} {'total':>8}{times}"]
    for x in layers:
        times = f" {_figure(x.sparse_ms):>10} {_figure(x.dense_ms):>10}" if timed else ""
        lines.append(
            f"{x.name:<{width}} {ran_by[x.name]:<{by}} {x.sparse_calls:>7} {x.dense_calls:>7} "
            f"{_figure(x.density):>8} {_figure(x.total_density):>8}{times}"
        )
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def sparse_attention_summary(pipe_or_transformer: Any) -> SparseSummary:
    """Plan, calls, densities, kernels, grids, times and reasons for dense attention, since it was enabled.

    Asking makes no GPU wait, unless the plan's blocks are picked while the model runs: what was kept is counted on the
    GPU, and read when it is asked for. Times are there on a CPU, and on a GPU where ``timing=True`` was given to
    :func:`enable_sparse_attention`; calls in compiled code are not timed.
    """
    result = {}
    for name, transformer in find_transformers(pipe_or_transformer).items():
        state = state_of(transformer)
        if state is not None and state.tap is None:
            result[name] = _summarise(name, state)
    return SparseSummary(result)


def _summarise(name: str, state: ModelState) -> TransformerSummary:
    with state.counting() as counts:
        for c in counts:
            c.read()
        layers = tuple(
            LayerSummary(
                name=layer.name,
                sparse_calls=c.sparse_calls,
                dense_calls=c.dense_calls,
                density=c.sparse_density / c.sparse_calls if c.sparse_calls else None,
                total_density=c.done / c.work if c.work else None,
                dense_reasons=dict(c.reasons),
                backends=dict(c.backends),
                unseen_calls=c.unseen,
                dense_kernels=dict(c.dense_kernels),
                sparse_ms=1e3 * c.sparse_seconds / c.timed_sparse if c.timed_sparse else None,
                dense_ms=1e3 * c.dense_seconds / c.timed_dense if c.timed_dense else None,
                timed_calls=c.timed_sparse + c.timed_dense,
                seconds=c.sparse_seconds + c.dense_seconds if c.timed_sparse + c.timed_dense else None,
                pick_seconds=c.pick_seconds if c.timed_picks else None,
            )
            for layer, c in zip(state.layers, counts)
        )
        work, plan = sum(c.work for c in counts), state.plan
        done = sum(c.done for c in counts)
        sparse = sum(c.sparse_calls for c in counts)
        sparse_density = sum(c.sparse_density for c in counts)
        races = dict(state.dense.races) if state.dense is not None else {}
        return TransformerSummary(
            name=name,
            model_class=state.family_class,
            plan=state.source,
            backend=state.backend,
            forwards=state.forwards,
            density=done / work if work else None,
            call_density=sparse_density / sparse if sparse else None,
            work=work,
            grids={str(grid): count for grid, count in state.grids.items()},
            carried={str(grid): count for grid, count in state.carried.items() if count},
            skipped=dict(state.skipped),
            layers=layers,
            repaired_heads=0 if plan is None or plan.fitted_repair is None else plan.fitted_repair.num_heads,
            online_rows=None if plan is None or plan.online_repair is None else plan.online_repair.rows,
            reused_heads=sum(c.reused_heads for c in counts),
            reuse_bytes=state.reuse.peak,
            calls_without_projections=sum(c.without_projections for c in counts),
            rules=tuple(str(rule) for rule in state.rules),
            pick_bytes=state.reuse.picks.peak,
            dense_backend="fastest" if state.dense is not None else None,
            races={str(key): str(race) for key, race in races.items()},
            race_excluded={str(key): dict(race.excluded) for key, race in races.items()},
            shared=_shared(state),
        )


def _shared(state: ModelState) -> str:
    share, heads = state.share, state.architecture.heads
    if share is None:
        return ""
    return (
        f"{share.ranks} processes share the heads of each layer: this one, number {share.rank}, computes {state.heads} "
        f"of {heads}; in the most uneven layer the fullest has {state.uneven:.2f}x the mean to do"
    )
