"""Speed of the kernels on this machine, beside dense attention and beside peers, each figure behind a check.

No kernel is timed whose output on the very inputs and lists that are timed is not right at sampled rows. What is
missing, refuses, fails or is wrong has a row too, with the reason and without a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from benchmarks.library.cases import Case, Setting, with_outliers
from benchmarks.library.peers import PEERS, Inputs, Prepared, block_lists, cannot_express, cannot_run_peer
from benchmarks.library.sampled import sampled_error, tolerance
from diffsparse.entry import HeadEntry
from diffsparse.kernels.api import sparse_attention
from diffsparse.kernels.backends import BACKENDS, last_resort
from diffsparse.kernels.checks import check
from diffsparse.kernels.clock import samples_ms, timing
from diffsparse.kernels.dense import DENSE_KERNELS, cannot_run_dense, dense_attention
from diffsparse.layout import BlockLayout, build_layout

__all__ = ["OK", "TIMED_BACKENDS", "Executed", "Row", "bench_case", "describe", "executed"]

OK = "ok"
#: ``reference`` defines what is right and is not made for speed.
TIMED_BACKENDS = tuple(name for name in BACKENDS if name != last_resort().name)


@dataclass(frozen=True)
class Row:
    """One kernel on one setting of a case.

    kind: ``dense``, ``own`` or ``peer``. blocks: share of all blocks that is kept and computed (skipped heads count as
    none). tflops: ``4 * head_dim * executed query-key pairs of real tokens / time``; block_tflops: the same with short
    blocks counted as whole ones. vs_dense: the fastest dense attention's time over this one. vs_peer: the fastest
    peer's on this setting over this one. over_baseline: time over what this setting's blocks would take at the
    baseline setting's rate with the same kernel. error: relative, at sampled rows. status: ``ok``, or why there is no
    time.
    """

    case: str
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    setting: str
    lists: str
    tail: str
    name: str
    kind: str
    numerics: str
    block_size: int
    blocks: float
    status: str
    error: float | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int = 0
    tflops: float | None = None
    block_tflops: float | None = None
    vs_dense: float | None = None
    vs_peer: float | None = None
    over_baseline: float | None = None


@dataclass(frozen=True)
class Executed:
    """Work of one layout, all heads: blocks kept, of how many there are, and query-key pairs of real tokens in them."""

    blocks: int
    all_blocks: int
    pairs: float

    @property
    def share(self) -> float:
        """Of all blocks."""
        return self.blocks / self.all_blocks


def executed(layout: BlockLayout) -> Executed:
    """Count what a layout keeps. Summaries of tails are not counted."""
    heads, n = layout.num_heads, layout.num_blocks
    length = layout.tokens.block_start.diff(dim=1).double()[layout.tokens.head_order.long()]  # [H, N]
    row = torch.repeat_interleave(torch.arange(heads * n, device=layout.device), layout.index.row_ptr[0].diff().long())
    head = row // n
    pairs = float((length.view(-1)[row] * length.view(-1)[head * n + layout.index.col_idx.long()]).sum())
    real = (length > 0).sum(1).double()
    return Executed(layout.index.col_idx.numel(), int((real * real).sum()), pairs)


@dataclass(frozen=True)
class _Candidate:
    """A kernel on one setting. ``prepare`` makes what is timed; ``layout`` is what it has to compute."""

    row: Row
    layout: BlockLayout
    kv_len: torch.Tensor | None
    prepare: Callable[[], Prepared]


def bench_case(
    case: Case,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    backends: Sequence[str] = TIMED_BACKENDS,
    numerics: Sequence[str] = ("auto",),
    dense: Sequence[str] = DENSE_KERNELS,
    peers: Sequence[str] = tuple(PEERS),
    budget_ms: float = 300.0,
    rounds: int = 1,
    say: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Time a case on random inputs: the dense kernels once, then every setting on every backend, numerics and peer.

    ``rounds``: how often all kernels of a setting are timed in turn, their samples put together. ``budget_ms``: of one
    kernel in one round, warming up not counted. ``say`` gets the rows of each setting as soon as they are complete.
    """
    device = torch.device(device)
    draw = torch.Generator(device).manual_seed(0)
    shape = (1, case.grid.seq_len, case.heads, case.head_dim)
    q, k, v = (torch.randn(*shape, generator=draw, device=device, dtype=dtype) for _ in range(3))
    if case.outliers:
        # Logits would be hundreds with q and k as wide as they come.
        q, k, v = with_outliers(q) / 4, with_outliers(k) / 4, with_outliers(v)
    inputs = Inputs(q, k, v)
    base = Row(
        case=case.name, tokens=case.grid.seq_len, heads=case.heads, head_dim=case.head_dim,
        dtype=str(dtype).removeprefix("torch."), setting="dense", lists="", tail="none", name="", kind="dense",
        numerics="auto", block_size=0, blocks=1.0, status=OK,
    )  # fmt: skip

    def timed(candidates: Iterator[_Candidate | Row]) -> list[Row]:
        return list(_time(candidates, inputs, device, budget_ms, rounds))

    full = build_layout(case.grid, (HeadEntry(),) * case.heads, case.block_size)
    rows = timed(_dense_candidates(base, full.to(device), inputs, dense))
    best_dense = min((r.ms for r in rows if r.ms is not None), default=None)
    rows = [replace(r, vs_dense=_ratio(best_dense, r.ms)) for r in rows]
    for row in rows:
        say(row)
    wanted = {setting.like for setting in case.settings}
    shares = {
        setting.label: executed(setting.layout(case.grid, case.block_size)).share
        for setting in case.settings
        if setting.label in wanted
    }
    done: dict[str, list[Row]] = {}
    for setting in case.settings:
        share = shares[setting.like] if setting.like is not None else None
        own = case.layout(setting, share).to(device)
        found = timed(_own_candidates(base, case, setting, own, inputs, backends, numerics))
        if case.peers and not own.heads.has_tail:
            found += timed(_peer_candidates(base, case, setting, own, inputs, peers, share))
        best_peer = min((r.ms for r in found if r.kind == "peer" and r.ms is not None), default=None)
        against = {(r.name, r.numerics): r for r in done.get(setting.baseline or "", ())}
        done[setting.label] = [
            replace(
                r,
                vs_dense=_ratio(best_dense, r.ms),
                vs_peer=_ratio(best_peer, r.ms),
                over_baseline=_over(r, against.get((r.name, r.numerics))),
            )
            for r in found
        ]
        for row in done[setting.label]:
            say(row)
        rows += done[setting.label]
    return rows


def describe(row: Row) -> str:
    """One line for readers."""
    name = row.name if row.numerics == "auto" else f"{row.name} {row.numerics}"
    head = f"{row.case:<13}{row.setting:<16}{row.kind:<6}{name:<26}"
    if row.status != OK or row.ms is None:
        return f"{head}not timed: {row.status}"
    ratios = (("dense", row.vs_dense), ("peer", row.vs_peer), ("over baseline", row.over_baseline))
    told = "".join(f"  {label} {value:.2f}x" for label, value in ratios if value is not None)
    return f"{head}{row.ms:10.3f} ms  {row.tflops:8.2f} TF/s  error {row.error:.1e}{told}"


def _ratio(of: float | None, over: float | None) -> float | None:
    return None if of is None or over is None else of / over


def _over(row: Row, baseline: Row | None) -> float | None:
    return None if baseline is None else _ratio(baseline.block_tflops, row.block_tflops)


def _dense_candidates(
    base: Row, layout: BlockLayout, inputs: Inputs, names: Sequence[str]
) -> Iterator[_Candidate | Row]:
    for name in names:
        row = replace(base, name=name)
        if (reason := cannot_run_dense(name, inputs.q)) is not None:
            yield replace(row, status=reason)
            continue
        run = partial(dense_attention, inputs.q, inputs.k, inputs.v, kernel=name)
        if name.endswith(("_int8", "_fp8")):
            row = replace(row, numerics=name.rsplit("_", 1)[1])
        yield _Candidate(row, layout, None, lambda run=run: Prepared(run, lambda out: out))  # type: ignore[misc]


def _setting_row(base: Row, setting: Setting, layout: BlockLayout) -> Row:
    tails = sorted({entry.execution.tail for entry in setting.entries})
    return replace(
        base,
        setting=setting.label,
        lists="shared" if setting.shared else "per head",
        tail="+".join(tails),
        block_size=layout.block_size,
        blocks=executed(layout).share,
    )


def _own_candidates(
    base: Row,
    case: Case,
    setting: Setting,
    layout: BlockLayout,
    inputs: Inputs,
    backends: Sequence[str],
    numerics: Sequence[str],
) -> Iterator[_Candidate | Row]:
    q, k, v = inputs.q, inputs.k, inputs.v
    base = replace(_setting_row(base, setting, layout), kind="own")
    kv_len = None
    if setting.masked_text:
        kv_len = torch.full((1,), case.grid.seq_len - setting.masked_text, dtype=torch.int32, device=q.device)
    for backend in backends:
        for wanted in numerics:
            row = replace(base, name=backend, numerics=wanted)
            if (reason := check(q, k, v, layout, kv_len=kv_len, numerics=wanted, backend=backend)) is not None:
                yield replace(row, status=reason)
                continue
            run = partial(sparse_attention, q, k, v, layout, kv_len=kv_len, numerics=wanted, backend=backend)
            yield _Candidate(row, layout, kv_len, lambda run=run: Prepared(run, lambda out: out))  # type: ignore[misc]


def _peer_candidates(
    base: Row,
    case: Case,
    setting: Setting,
    own: BlockLayout,
    inputs: Inputs,
    names: Sequence[str],
    share: float | None,
) -> Iterator[_Candidate | Row]:
    layouts = {own.block_size: own}
    for name in names:
        row = replace(_setting_row(base, setting, own), name=name, kind="peer")
        if (reason := cannot_run_peer(name, inputs.q)) is not None:
            yield replace(row, status=reason)
            continue
        size = PEERS[name].block_sizes
        # Where a peer has other blocks, as many of its own are kept.
        block = own.block_size if own.block_size in size else size[0]
        if block not in layouts:
            layouts[block] = setting.layout(case.grid, block, share).to(inputs.q.device)
        layout = layouts[block]
        if (reason := cannot_express(layout)) is not None:
            yield replace(row, status=f"its masks cannot express {reason}")
            continue
        row = replace(_setting_row(row, setting, layout), name=name, kind="peer")
        make = PEERS[name].prepare
        yield _Candidate(row, layout, None, lambda make=make, layout=layout: make(inputs, block_lists(layout)))  # type: ignore[misc]


def _time(
    candidates: Iterator[_Candidate | Row], inputs: Inputs, device: torch.device, budget_ms: float, rounds: int
) -> Iterator[Row]:
    """Rows in the candidates' order: each one checked, then all that passed timed in turn."""
    held: list[Row | tuple[_Candidate, Prepared, float]] = []
    for candidate in candidates:
        if isinstance(candidate, Row):
            held.append(candidate)
            continue
        limit = tolerance(inputs.q.dtype, candidate.row.numerics)
        try:
            _poison(inputs.q)
            prepared = candidate.prepare()
            out = prepared.finish(prepared.run())
            error = sampled_error(out, inputs.q, inputs.k, inputs.v, candidate.layout, kv_len=candidate.kv_len)
            del out
        except Exception as failure:  # whatever stops a kernel is told in its row
            held.append(replace(candidate.row, status=_reason(failure)))
            continue
        if not error <= limit:
            held.append(
                replace(
                    candidate.row, error=error, status=f"wrong: off by {error:.2g}, {limit:g} is allowed (relative)"
                )
            )
            continue
        held.append((candidate, prepared, error))
    samples: dict[int, list[float]] = {}
    failed: dict[int, str] = {}
    for _ in range(rounds):
        for i, one in enumerate(held):
            if isinstance(one, Row) or i in failed:
                continue
            try:
                samples.setdefault(i, []).extend(samples_ms(one[1].run, device, budget_ms))
            except Exception as failure:
                failed[i] = _reason(failure)
    for i, one in enumerate(held):
        if isinstance(one, Row):
            yield one
        elif i in failed:
            yield replace(one[0].row, error=one[2], status=failed[i])
        else:
            row, done = replace(one[0].row, error=one[2], **asdict(timing(samples[i]))), executed(one[0].layout)
            assert row.ms is not None
            rate = 4 * row.head_dim / row.ms / 1e9
            yield replace(
                row, tflops=rate * done.pairs, block_tflops=rate * done.blocks * one[0].layout.block_size ** 2
            )


def _poison(q: torch.Tensor) -> None:
    """Leave NaN in the memory that is handed out next: a kernel that writes nothing could find an old result there."""
    torch.full_like(q, float("nan"))


def _reason(failure: Exception) -> str:
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[0].strip()[:300]}" if lines else type(failure).__name__
