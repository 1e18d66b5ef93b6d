"""The benchmark of one denoising step runs as it stands, on tiny models."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.library.steps import measure
from benchmarks.library.steps.attention import pass_on, self_attention, without_mask
from benchmarks.library.steps.measure import bench_model
from benchmarks.library.steps.models import MODELS, TINY, build, inputs
from benchmarks.library.steps.plans import plan_of
from benchmarks.library.steps.rows import describe
from diffsparse.layout import build_layout
from diffsparse.order import AxisOrder, RasterOrder
from diffsparse.search.errors import BadInput
from tests.helpers.scripts import load_script
from tests.tolerance import MODEL, Work, assert_near

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "pipeline.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


def run(tmp_path: Path, *options: str) -> list[dict[str, str]]:
    out, plot = tmp_path / "rows.csv", tmp_path / "plot.png"
    command = [sys.executable, str(SCRIPT), "--tiny", "--seconds", "0.4", "--csv", str(out), "--plot", str(plot)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    return list(csv.DictReader(out.open()))


def check(rows: list[dict[str, str]], layers: int = 2) -> None:
    """What is faster than what, by the fastest of several steps: on a busy machine a single one tells nothing."""
    rest, dense, *others = rows
    assert all(int(row["samples"]) >= 2 for row in rows)
    if dense["model"] == "hunyuan-720p":  # whose text may be padded
        unmasked = others.pop(0)
        assert unmasked["what"] == "unmasked" and float(unmasked["ms_low"]) > float(rest["ms_low"])
    fastest, *sparse = others
    assert fastest["what"] == "fastest" and fastest["backend"] and float(fastest["speedup"]) > 0
    assert [dense["what"], rest["what"]] == ["dense", "rest"] and len(sparse) == 2
    assert float(rest["ms_low"]) < float(dense["ms_low"])
    share = 1 - float(rest["ms"]) / float(dense["ms"])
    assert float(dense["attention_share"]) == pytest.approx(share, rel=1e-4)
    for row, asked in zip(sparse, (0.4, 0.15)):
        assert row["status"] == "ok" and float(row["asked"]) == asked
        assert abs(float(row["density"]) - asked) < 0.15
        assert float(row["speedup"]) == pytest.approx(float(dense["ms"]) / float(row["ms"]), rel=1e-4)
    assert sparse[1]["tail"] == "moments" and int(dense["layers"]) == layers
    assert all(row["gpu"] and row["date"] and row["torch"] for row in rows)


def test_eager_steps(tmp_path: Path) -> None:
    rows = run(tmp_path, "--modes", "eager", "--models", "wan-14b-720p,hunyuan-720p", "--settings", "0.4,0.15:moments")
    for name in ("wan-14b-720p", "hunyuan-720p"):
        check([row for row in rows if row["model"] == name])
    assert {row["backend"] for row in rows if row["what"] == "sparse"} == {"cpu"}


@pytest.mark.slow(reason="compiles a model with Inductor in a process of its own")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++")
def test_compiled_steps(tmp_path: Path) -> None:
    rows = run(tmp_path, "--models", "wan-14b-720p", "--settings", "0.4,0.15:moments")
    for mode in ("eager", "compiled"):
        check([row for row in rows if row["mode"] == mode])
    assert {row["backend"] for row in rows if row["what"] == "sparse"} == {"cpu", "compiled"}


def test_full_sizes_are_the_models_own() -> None:
    """Tokens as in the models' own pipelines; parameters as their names say, counted without memory."""
    tokens = {name: model.grid.seq_len for name, model in MODELS.items()}
    assert tokens == {
        "wan-1.3b-480p": 32760,
        "wan-1.3b-720p": 75600,
        "wan-14b-720p": 75600,
        "hunyuan-720p": 118800 + 256,
    }
    for name, billions in (("wan-1.3b-480p", 1.42), ("wan-14b-720p", 14.3), ("hunyuan-720p", 12.8)):
        model = build(MODELS[name], torch.device("meta"), torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_plans_have_the_density_asked_for() -> None:
    model = TINY["wan-14b-720p"]
    transformer = build(model, torch.device("cpu"), torch.float32)
    plan = plan_of(transformer, model.grid, 0.25, "moments", 64, "mixed")
    assert {type(e.order) for e in plan.entries} == {AxisOrder, RasterOrder}
    assert {e.execution.tail for e in plan.entries} == {"moments"}
    for name, density in (("wan-1.3b-480p", 0.25), ("wan-14b-720p", 0.08), ("hunyuan-720p", 0.25)):
        model = MODELS[name]
        transformer = build(model, torch.device("meta"), torch.float32)
        plan = plan_of(transformer, model.grid, density, "none", 128, "mixed")
        layout = build_layout(model.grid, plan.entries, 128)
        assert layout.density == pytest.approx(density, abs=0.005)
        # What kernels multiply, whole blocks, is no more than that.
        executed = layout.index.row_ptr[0, -1].item() * 128**2 / layout.num_heads
        assert executed / model.grid.seq_len**2 == pytest.approx(layout.density, rel=0.005)


def test_a_plan_in_8_bits() -> None:
    """On a device that has none it runs all the same, in the model's own precision; a dense one stays dense there."""
    model = TINY["wan-14b-720p"]
    transformer = build(model, torch.device("cpu"), torch.float32)
    plan = plan_of(transformer, model.grid, 1.0, "none", 64, "mixed", "fp8")
    assert {e.execution.numerics for e in plan.entries} == {"fp8"}
    assert plan.call_densities(model.grid).min() == 1
    rows = bench_model(
        "tiny", model, device=torch.device("cpu"), dtype=torch.float32, modes=["eager"], block_size=64, backend="cpu",
        seconds=0.001, most=2, say=lambda row: None, settings=[(0.3, "mean", "int8"), (1.0, "none", "int8")],
        kind="mixed", with_fastest=False,
    )  # fmt: skip
    assert rows[2].status == "ok" and rows[2].numerics == "int8"
    assert rows[3].status.endswith("calls ran dense: every block is kept on this grid")
    assert "sparse 0.3 mean int8" in describe(rows[2])


def test_rest_leaves_keys_and_values_to_be_made() -> None:
    """Compiled too, where what nobody reads is left out."""
    from torch._dynamo.backends.common import aot_autograd

    products = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        products.append(sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes))
        return graph

    transformer = build(TINY["wan-14b-720p"], torch.device("cpu"), torch.float32)
    module = sys.modules[type(transformer).__module__]

    with self_attention(transformer, 6, pass_on), torch.no_grad():
        weights = [torch.randn(8, 8) for _ in range(3)]

        def three(x: torch.Tensor) -> torch.Tensor:
            q, k, v = ((x @ w).view(1, 6, 2, 4) for w in weights)
            return module.dispatch_attention_fn(q, k, v)

        x = torch.randn(6, 8)
        compiled = torch.compile(three, backend=aot_autograd(fw_compiler=count), fullgraph=True)
        assert_near(compiled(x), (x @ weights[0]).view(1, 6, 2, 4), Work(length=8))
    assert products == [3]


def test_a_mask_of_padding_that_hides_nothing_changes_nothing() -> None:
    """So that dense attention may be timed without it, which is faster."""
    model = TINY["hunyuan-720p"]
    transformer = build(model, torch.device("cpu"), torch.float32)
    arguments = inputs(model, transformer, torch.device("cpu"), torch.float32)
    masks: list[Any] = []

    def watch(own: Any, *qkv: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        masks.append(kwargs["attn_mask"])
        return without_mask(own, *qkv, **kwargs)

    with torch.no_grad():
        masked = transformer(**arguments)[0]
        with self_attention(transformer, model.grid.seq_len, watch):
            unmasked = transformer(**arguments)[0]
    assert len(masks) == 2 and all(mask is not None and mask.all() for mask in masks)
    assert_near(unmasked, masked, MODEL)

    rows = bench_model(
        "tiny", model, device=torch.device("cpu"), dtype=torch.float32, modes=["eager"], block_size=64, backend="cpu",
        seconds=0.001, most=2, say=lambda row: None, settings=[], kind="mixed", with_fastest=False,
    )  # fmt: skip
    assert [(row.what, row.status) for row in rows] == [("rest", "ok"), ("dense", "ok"), ("unmasked", "ok")]
    assert "dense, no mask" in describe(rows[2])


def test_eager_steps_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer that has been compiled stays so."""
    events: list[str] = []
    kind = sys.modules["diffusers"].WanTransformer3DModel
    monkeypatch.setattr(kind, "compile_repeated_blocks", lambda self, **options: events.append("compile"))
    bench_model(
        "tiny", TINY["wan-14b-720p"], device=torch.device("cpu"), dtype=torch.float32, block_size=64,
        modes=["compiled", "eager"], backend="cpu", seconds=0.001, most=2, settings=[], kind="mixed",
        say=lambda row: events.append(f"{row.mode} {row.what}"), with_fastest=False,
    )  # fmt: skip
    assert events == ["eager rest", "eager dense", "compile", "compiled rest", "compiled dense"]


def test_a_step_that_fails_or_runs_dense_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(**options: Any) -> list[Any]:
        return bench_model(
            "tiny", TINY["wan-14b-720p"], device=torch.device("cpu"), dtype=torch.float32, modes=["eager"],
            block_size=64, backend="cpu", seconds=0.001, most=2, say=lambda row: None,
            **{"settings": [(0.3, "none", "auto")], "kind": "mixed", **options},
        )  # fmt: skip

    rest, dense, fastest, sparse = (row.status for row in bench(settings=[(1.0, "none", "auto")], kind="band"))
    assert dense == rest == fastest == "ok" and sparse.endswith("calls ran dense: every block is kept on this grid")
    monkeypatch.setattr(measure, "plan_of", lambda *a: (_ for _ in ()).throw(RuntimeError("no plan\ntoday")))
    assert [row.status for row in bench()] == ["ok", "ok", "ok", "RuntimeError: no plan"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2", "above 0 and at most at 1"),
        ("0.1:long", "tail"),
        ("x", "float"),
        ("0.1:mean:centroids", "one tail"),
        ("0.1:int8:fp8", "one numerics"),
        ("0.1:moments:int8", "cannot run with numerics 'int8'"),
    ],
)
def test_settings(script: ModuleType, text: str, reason: str) -> None:
    known = {
        "0.5": (0.5, "none", "auto"),
        "0.08:moments": (0.08, "moments", "auto"),
        "1:int8": (1.0, "none", "int8"),
        "0.08:fp8:mean": (0.08, "mean", "fp8"),
    }
    assert script.parse_settings(",".join(known)) == list(known.values())
    with pytest.raises(BadInput, match=reason):
        script.parse_settings(text)
