"""Time one denoising step of real models with random weights, dense and sparse, eager and compiled:

    python benchmarks/pipeline.py --device cuda --models wan-14b-720p --csv benchmarks/results/pipeline_h200.csv
    python benchmarks/pipeline.py --tiny                 # the same on tiny models on a CPU, in seconds

A step is one forward of the transformer at batch 1. `rest` is the same forward with a copy of the query in the place of
self-attention, so the share of attention is `(step - rest) / step`. Sparse steps run plans of windows and bands whose
density of kept blocks is nearest to the one asked for; a setting `0.08:moments` has a tail, which comes on top,
`0.25:int8` takes products in 8 bits, and `1:int8` is dense attention in 8 bits. A step counts only if its output is
finite and every self-attention call of it ran sparse. Ends with status 1 where one did not.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

# ruff: noqa: E402
# This file's folder, first on the path, would have kernels.py stand in for Hugging Face's package of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch

from diffsparse.entry import NUMERICS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import BACKENDS
from diffsparse.layout import build_layout
from diffsparse.order import AxisOrder, RasterOrder, TokenOrder
from diffsparse.patterns import Band, Pattern, Window
from diffsparse.pipelines import architecture_of, sparse_attention, sparse_attention_summary
from diffsparse.plan import SparsityPlan
from diffsparse.presets import preset
from diffsparse.schedule import Schedule
from diffsparse.search import script
from diffsparse.search.environment import stamp
from diffsparse.search.errors import BadInput

OK = "ok"


@dataclass(frozen=True)
class Model:
    """family: ``wan`` or ``hunyuan_video``. latents: ``(frames, height, width)`` before patches of 1 x 2 x 2.

    config: what differs from the class's own defaults.
    """

    family: str
    latents: tuple[int, int, int]
    config: dict[str, Any] = field(default_factory=dict)
    text: int = 0

    @property
    def grid(self) -> TokenGrid:
        """Tokens of a self-attention call."""
        frames, height, width = self.latents
        return TokenGrid(frames, height // 2, width // 2, text_after=self.text if self.family != "wan" else 0)


_WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
#: Wan2.1-14B and HunyuanVideo are the defaults of their classes; 81 frames (Wan) and 129 (HunyuanVideo).
MODELS = {
    "wan-1.3b-480p": Model("wan", (21, 60, 104), _WAN_1_3B, 512),
    "wan-1.3b-720p": Model("wan", (21, 90, 160), _WAN_1_3B, 512),
    "wan-14b-720p": Model("wan", (21, 90, 160), {}, 512),
    "hunyuan-720p": Model("hunyuan_video", (33, 90, 160), {}, 256),
}
_TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "text_dim": 16,
    "freq_dim": 32,
}
_TINY_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (8, 12, 12),
}
TINY = {
    "wan-1.3b-480p": Model("wan", (5, 32, 48), _TINY_WAN, 7),
    "wan-1.3b-720p": Model("wan", (5, 48, 48), _TINY_WAN, 7),
    "wan-14b-720p": Model("wan", (5, 48, 48), _TINY_WAN, 7),
    "hunyuan-720p": Model("hunyuan_video", (5, 48, 48), _TINY_HUNYUAN, 20),
}


@dataclass(frozen=True)
class Row:
    """One step.

    what: ``dense``, ``unmasked`` (dense, without the padding mask of a model that has one), ``rest``, ``fastest``
    (dense, on the fastest kernel that is installed) or ``sparse``. asked: the density asked for. density: of a call as
    it ran, tails counted, mean over layers and heads. backend: what ran. attention_share: of this step. speedup: the
    dense step of the same mode over this one; attention_speedup: the same of what is not ``rest``. peak_gib: memory at
    the highest, the weights included.
    """

    model: str
    tokens: int
    layers: int
    heads: int
    head_dim: int
    dtype: str
    mode: str
    what: str
    asked: float = 1.0
    tail: str = "none"
    numerics: str = "auto"
    block_size: int = 0
    density: float = 1.0
    backend: str = ""
    status: str = OK
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    samples: int = 0
    attention_share: float | None = None
    speedup: float | None = None
    attention_speedup: float | None = None
    peak_gib: float | None = None
    peak_vs_dense: float | None = None


# -- models ------------------------------------------------------------------------------------------------------------


def build(model: Model, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer, made where it will run and in its precision, so that the host never holds it."""
    from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

    kind = WanTransformer3DModel if model.family == "wan" else HunyuanVideoTransformer3DModel
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = kind(**model.config)
    finally:
        torch.set_default_dtype(before)
    return transformer.eval().requires_grad_(False)


def inputs(model: Model, transformer: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one forward in the middle of the noise levels."""
    draw = torch.Generator(device).manual_seed(1)
    normal = partial(torch.randn, generator=draw, device=device, dtype=dtype)
    config = transformer.config
    found: dict[str, Any] = {
        "hidden_states": normal(1, config.in_channels, *model.latents),
        "timestep": torch.tensor([500], device=device),
        "return_dict": False,
    }
    if model.family == "wan":
        return {**found, "encoder_hidden_states": normal(1, model.text, config.text_dim)}
    return {
        **found,
        "encoder_hidden_states": normal(1, model.text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, model.text, dtype=torch.bool, device=device),
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
    }


@torch.library.custom_op("diffsparse_benchmarks::pass_on", mutates_args=())
def _pass_on(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The query, as a compiler knows nothing of: else it would leave out what only keys and values are made for."""
    return query.clone()


@_pass_on.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


@contextmanager
def self_attention(transformer: Any, tokens: int, instead: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Calls of self-attention go to ``instead``, after the function that they would have gone to."""
    module = sys.modules[type(transformer).__module__]
    own = module.dispatch_attention_fn

    def dispatch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.shape[1] == tokens and key.shape[1] == tokens:
            return instead(own, query, key, value, *args, **kwargs)
        return own(query, key, value, *args, **kwargs)

    module.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        module.dispatch_attention_fn = own


def pass_on(own: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """A copy of the query: what a step costs beside self-attention."""
    return _pass_on(query, key, value)


def without_mask(own: Any, *qkv: torch.Tensor, attn_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
    """Attention without the mask of a text's padding, of which there is none here: dense kernels are faster so."""
    return own(*qkv, **kwargs)


@contextmanager
def dense_kernel(name: str) -> Iterator[None]:
    """torch's attention by cuDNN, or as torch chooses (``default``)."""
    if name == "default":
        yield
        return
    cuda = torch.backends.cuda
    before = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    try:
        yield
    finally:
        cuda.enable_flash_sdp(before[0])
        cuda.enable_mem_efficient_sdp(before[1])


# -- plans -------------------------------------------------------------------------------------------------------------


def nearest(
    make: Callable[[float], Pattern], order: TokenOrder, grid: TokenGrid, density: float, block_size: int
) -> tuple[Pattern, float]:
    """The pattern of a family, ``make(x)`` with x in (0, 1] and denser as x grows, whose kept density is nearest."""

    def kept(pattern: Pattern) -> float:
        return build_layout(grid, [HeadEntry(order, pattern)], block_size).density

    low, high = 0.0, 1.0
    found: list[tuple[float, Pattern, float]] = []
    for _ in range(12):
        x = (low + high) / 2
        pattern = make(x)
        got = kept(pattern)
        found.append((abs(got - density), pattern, got))
        low, high = (x, high) if got < density else (low, x)
    _, pattern, got = min(found, key=lambda item: item[0])
    return pattern, got


def plan_of(
    transformer: Any, grid: TokenGrid, density: float, tail: str, block_size: int, kind: str, numerics: str = "auto"
) -> SparsityPlan:
    """All layers alike: windows over all frames (``window``), bands along the sequence (``band``), or in turn
    (``mixed``).

    A window's tokens are ordered by height, then width, then frame. So a block is a few sites through all frames, which
    fills it on every grid, and a window of the same density reaches farther than on tiles of one frame.
    """
    architecture = architecture_of(transformer)
    families: dict[str, tuple[Callable[[float], Pattern], TokenOrder]] = {
        "window": (lambda x: Window((None, x, x)), AxisOrder("HWF")),
        "band": (Band, RasterOrder()),
    }
    execution = Execution(tail=tail, numerics=numerics)
    entries = []
    for name in ("window", "band") if kind == "mixed" else (kind,):
        make, order = families[name]
        entries.append(HeadEntry(order, nearest(make, order, grid, density, block_size)[0], execution=execution))
    heads = [entries[h % len(entries)] for h in range(architecture.heads)]
    return SparsityPlan.from_table(
        {layer: [heads] for layer in architecture.layers}, schedule=Schedule(), block_size=block_size
    )


# -- timing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    times: list[float]
    peak_gib: float | None
    finite: bool


@torch.no_grad()
def run_step(forward: Callable[[], Any], device: torch.device, seconds: float, most: int) -> Step:
    """Milliseconds of single forwards, over about ``seconds``, two at least, after one or two to warm up."""
    out = forward()[0]
    finite = bool(out.isfinite().all())
    del out

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    peak = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    first = once()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    # A forward that takes this long is warm after one.
    times = [first] if first > seconds * 500 else []
    while len(times) < 2 or (len(times) < most and sum(times) < seconds * 1e3):
        times.append(once())
    return Step(times, peak, finite)


def told(row: Row, step: Step) -> Row:
    status = row.status if row.status != OK or step.finite else "the output is not finite"
    return replace(
        row,
        status=status,
        ms=statistics.median(step.times),
        ms_low=min(step.times),
        ms_high=max(step.times),
        samples=len(step.times),
        peak_gib=step.peak_gib,
    )


def ratios(rows: list[Row]) -> list[Row]:
    """Fill in what is relative to ``dense`` and ``rest`` of the same mode."""
    dense = next((r for r in rows if r.what == "dense"), None)
    rest = next((r for r in rows if r.what == "rest"), None)
    done = []
    for row in rows:
        if row.ms is not None and dense is not None and dense.ms is not None:
            row = replace(row, speedup=dense.ms / row.ms)
            if row.peak_gib and dense.peak_gib:
                row = replace(row, peak_vs_dense=row.peak_gib / dense.peak_gib)
            if rest is not None and rest.ms is not None and row is not rest and row.what != "rest":
                own = row.ms - rest.ms
                row = replace(row, attention_share=own / row.ms)
                if own > 0:
                    row = replace(row, attention_speedup=(dense.ms - rest.ms) / own)
        done.append(row)
    return done


def bench_model(
    name: str,
    model: Model,
    *,
    device: torch.device,
    dtype: torch.dtype,
    modes: list[str],
    settings: list[tuple[float, str, str]],
    block_size: int,
    kind: str,
    backend: str,
    seconds: float,
    most: int,
    say: Callable[[Row], None],
    with_fastest: bool = True,
) -> list[Row]:
    """Every mode: dense, rest, then the sparse settings. One that fails has a row that says so."""
    transformer: Any = build(model, device, dtype)
    arguments = inputs(model, transformer, device, dtype)
    architecture = architecture_of(transformer)
    base = Row(
        model=name, tokens=model.grid.seq_len, layers=len(architecture.layers), heads=architecture.heads,
        head_dim=architecture.head_dim, dtype=str(dtype).removeprefix("torch."), mode="", what="",
    )  # fmt: skip

    def forward() -> Any:
        return transformer(**arguments)

    def attempt(row: Row, run: Callable[[Row], Row]) -> Row:
        torch._dynamo.reset()
        try:
            return run(row)
        except Exception as failure:  # told in its row, and by the exit status
            lines = [line for line in str(failure).splitlines() if line.strip()] or [""]
            return replace(row, status=f"{type(failure).__name__}: {lines[0].strip()[:300]}")
        finally:
            gc.collect()

    def plain(row: Row) -> Row:
        return told(row, run_step(forward, device, seconds, most))

    def rest(row: Row) -> Row:
        with self_attention(transformer, model.grid.seq_len, pass_on):
            return plain(row)

    def unmasked(row: Row) -> Row:
        with self_attention(transformer, model.grid.seq_len, without_mask):
            return plain(row)

    def sparse(row: Row) -> Row:
        plan = plan_of(transformer, model.grid, row.asked, row.tail, block_size, kind, row.numerics)
        with sparse_attention(transformer, plan, backend=backend):
            step = run_step(forward, device, seconds, most)
            found = sparse_attention_summary(transformer).transformers["transformer"]
        if found.dense_calls or found.sparse_calls != len(architecture.layers) * found.forwards:
            reasons = "; ".join(found.dense_reasons) or "calls are missing"
            row = replace(row, status=f"{found.dense_calls} calls ran dense: {reasons}")
        row = replace(row, density=found.call_density or 0.0, backend="+".join(found.backends), block_size=block_size)
        return told(row, step)

    def fastest(row: Row) -> Row:
        with sparse_attention(transformer, preset("dense"), dense_backend="fastest"):
            step = run_step(forward, device, seconds, most)
            found = sparse_attention_summary(transformer).transformers["transformer"]
        return told(replace(row, backend="+".join(found.dense_kernels)), step)

    rows: list[Row] = []
    for mode in sorted(modes, key=("eager", "compiled").index):  # what has been compiled stays so
        if mode == "compiled":
            transformer.compile_repeated_blocks(fullgraph=True)
        here: list[Row] = []
        wanted = {"rest": rest, "dense": plain}
        if "encoder_attention_mask" in arguments:
            wanted["unmasked"] = unmasked
        if with_fastest:
            wanted["fastest"] = fastest
        for what, run in wanted.items():
            here.append(attempt(replace(base, mode=mode, what=what), run))
            say(ratios(here)[-1])
        for density, tail, numerics in settings:
            row = replace(base, mode=mode, what="sparse", asked=density, tail=tail, numerics=numerics)
            here.append(attempt(row, sparse))
            say(ratios(here)[-1])
        rows += ratios(here)
    return rows


# -- what comes out ----------------------------------------------------------------------------------------------------


_DENSE = {"dense": "dense", "fastest": "dense, fastest", "unmasked": "dense, no mask"}


def _extras(row: Row) -> list[str]:
    return [word for word, usual in ((row.tail, "none"), (row.numerics, "auto")) if word != usual]


def describe(row: Row) -> str:
    what = _DENSE.get(row.what, row.what)
    if row.what == "sparse":
        what = " ".join([f"sparse {row.asked:g}", *_extras(row)])
    head = f"{row.model:<15}{row.mode:<10}{what:<22}"
    if row.ms is None:
        return f"{head}not timed: {row.status}"
    share = "" if row.attention_share is None else f"  attention {row.attention_share:5.1%}"
    speed = "" if row.what not in ("sparse", "fastest", "unmasked") or row.speedup is None else f"  {row.speedup:.2f}x"
    peak = "" if row.peak_gib is None else f"  peak {row.peak_gib:.1f} GiB"
    peak += "" if not row.backend else f"  {row.backend}"
    wrong = "" if row.status == OK else f"  NOT COUNTED: {row.status}"
    return f"{head}{row.ms:12.2f} ms  density {row.density:.3f}{share}{speed}{peak}{wrong}"


def write(rows: list[Row], machine: dict[str, str], as_csv: Path | None, as_json: Path | None) -> None:
    table: list[dict[str, Any]] = [{**asdict(row), **machine} for row in rows]
    if as_json is not None:
        as_json.write_text(json.dumps(table, indent=1) + "\n")
    if as_csv is not None:
        with as_csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in table)


def draw(rows: list[Row], machine: dict[str, str], path: Path) -> None:
    """One panel a model: what is not attention and what is, of every step, by the density it ran at."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row.model for row in rows))
    panel_rows = [
        [r for r in rows if r.model == name and r.ms is not None and r.status == OK and r.what != "rest"]
        for name in names
    ]
    figure, panels = plt.subplots(
        len(names), 1, figsize=(9, 1.2 + 0.28 * sum(len(mine) + 3 for mine in panel_rows)), squeeze=False,
        layout="constrained", height_ratios=[len(mine) + 1 for mine in panel_rows],
    )  # fmt: skip
    for name, mine, panel in zip(names, panel_rows, panels[:, 0]):
        for y, row in enumerate(mine):
            assert row.ms is not None
            attention = (row.attention_share or 0.0) * row.ms / 1e3
            color = "tab:gray" if row.attention_share is not None else "lightgray"
            panel.barh(y, row.ms / 1e3 - attention, color=color)
            color = "tab:orange" if row.what == "sparse" else "tab:blue"
            panel.barh(y, attention, left=row.ms / 1e3 - attention, color=color)
            if row.what != "dense" and row.speedup is not None:
                panel.annotate(f" {row.speedup:.2f}x", (row.ms / 1e3, y), va="center", fontsize="small")
        modes = len({row.mode for row in rows}) > 1
        labels = [_DENSE.get(r.what, " ".join([f"{r.density:.2f}", *_extras(r)])) for r in mine]
        labels = [f"{r.mode}, {label}" if modes else label for r, label in zip(mine, labels)]
        panel.set_yticks(range(len(mine)), labels, fontsize="small")
        panel.invert_yaxis()
        panel.set_title(f"{name}, {mine[0].tokens:,} tokens" if mine else name, fontsize="medium")
    panels[-1, 0].set_xlabel("seconds a step; gray: not attention, light gray: not told apart")
    figure.suptitle(f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_settings(text: str) -> list[tuple[float, str, str]]:
    """``0.5,0.08:moments,0.25:int8`` as densities, tails and numerics."""
    found = []
    for part in filter(None, text.split(",")):
        density, *words = part.split(":")
        numerics = [word for word in words if word in NUMERICS]
        tails = [word for word in words if word not in NUMERICS]
        try:
            value = float(density)
            if len(tails) > 1 or len(numerics) > 1:
                raise ValueError("one tail and one numerics at most")
            how = Execution(tail=(tails or ["none"])[0], numerics=(numerics or ["auto"])[0])
        except ValueError as error:
            message = f"{error}; write 0.25, 0.08:moments, 0.25:int8 or 0.08:centroids:int8"
            raise BadInput(f"--settings {part!r}: {message}") from None
        if not 0 < value <= 1:
            raise BadInput(f"--settings {part!r}: a density lies above 0 and at most at 1")
        found.append((value, how.tail, how.numerics))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument(
        "--settings", default="0.5,0.25,0.15,0.08:moments", help="densities, some with :tail or :numerics"
    )
    parser.add_argument("--plan", choices=("mixed", "window", "band"), default="mixed")
    parser.add_argument("--block-size", type=int, default=0, choices=(0, 64, 128), help="128, with --tiny 64")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="of the sparse kernel")
    parser.add_argument("--dense", choices=("cudnn", "default"), default="cudnn", help="dense attention on a GPU")
    parser.add_argument(
        "--fastest", action=argparse.BooleanOptionalAction, default=True, help="time the fastest dense kernel too"
    )
    parser.add_argument("--device", type=script.device, help="cuda where there is a GPU, else cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models in float32, on the CPU unless told otherwise")
    parser.add_argument("--seconds", type=script.seconds, default=3.0, help="to time one step, warming up not counted")
    parser.add_argument("--most", type=script.at_least_one, default=10, help="forwards timed of one step at most")
    parser.add_argument("--csv", type=script.out_file, help="write the rows here, as they come")
    parser.add_argument("--json", type=script.out_file, help="write the rows here, as they come")
    parser.add_argument("--plot", type=script.out_file, help="draw the steps here (needs matplotlib)")
    a = parser.parse_args()
    for given, known in ((a.models, MODELS), (a.modes, ("eager", "compiled"))):
        if unknown := [name for name in given.split(",") if name not in known]:
            raise BadInput(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    a.settings = parse_settings(a.settings)
    return a


def main() -> int:
    """Read the command line, time, write. The exit status."""
    a = arguments()
    device = a.device or script.device("cpu" if a.tiny else "auto")
    dtype = torch.float32 if a.tiny else torch.bfloat16
    machine = stamp(device)
    print(", ".join(f"{k} {v}" for k, v in machine.items() if v), flush=True)
    rows: list[Row] = []
    new: list[Row] = []

    def say(row: Row) -> None:
        print(describe(row), flush=True)
        new.append(row)
        write([*rows, *new], machine, a.csv, a.json)

    for name in a.models.split(","):
        new.clear()
        with dense_kernel(a.dense if device.type == "cuda" else "default"):
            rows += bench_model(
                name,
                (TINY if a.tiny else MODELS)[name],
                device=device,
                dtype=dtype,
                modes=a.modes.split(","),
                settings=a.settings,
                block_size=a.block_size or (64 if a.tiny else 128),
                kind=a.plan,
                backend=a.backend,
                seconds=a.seconds,
                most=a.most,
                say=say,
                with_fastest=a.fastest,
            )
        write(rows, machine, a.csv, a.json)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if a.plot is not None:
        draw(rows, machine, a.plot)
    return int(any(row.status != OK for row in rows))


if __name__ == "__main__":
    script.exit_with(main)
