"""``eval``, ``show`` and ``explain`` mean by a plan's name what enabling it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse.order import RasterOrder, TileOrder
from diffsparse.pipelines.resolve import resolve_plans
from diffsparse.preset_plans import PRESETS, preset
from diffsparse.search import api, cli, evaluate, load
from diffsparse.search.errors import BadInput
from diffsparse.search.explain import explain, shape_for
from tests.pipelines.models import flux, wan

CPU = torch.device("cpu")


class Pipe:
    """All that a plan needs to know of a pipeline."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.components = {"transformer": transformer}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("build", [wan, flux])
def test_eval_judges_the_plan_that_runs(
    name: str, build: Any, prompts_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = Pipe(build())
    judged = []

    def compare(pipe: Any, plan: Any, *args: Any, **options: Any) -> None:
        judged.append(plan)
        raise BadInput("seen")

    for module, what, stand_in in (
        (load, "load_pipeline", lambda *args, **options: pipe),
        (api, "asked_settings", lambda *args, **options: None),
        (evaluate, "generate_dense", lambda *args, **options: None),
        (evaluate, "compare", compare),
    ):
        monkeypatch.setattr(module, what, stand_in)
    with pytest.raises(SystemExit):
        cli.main(["eval", "owner/model", name, "--prompts", str(prompts_file)])
    assert "seen" in capsys.readouterr().err
    ((ran, _),) = resolve_plans(None, pipe.components, name).values()
    assert judged[0].to_files() == ran.to_files()


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--json"])
    assert not stopped.value.code
    return json.loads(capsys.readouterr().out)


def test_explain_and_show_tell_what_runs_on_images(capsys: pytest.CaptureFixture[str]) -> None:
    """In raster order every block of an image of 64 x 64 tokens is kept."""
    size = ("--height", "1024", "--width", "1024")
    image = told(capsys, "explain", "radial", "--model-shape", "FluxTransformer2DModel", *size)
    assert image["call_density"][0] < 0.7
    assert told(capsys, "explain", "radial", "--grid", "1,64,64")["call_density"] == image["call_density"]
    shown = told(capsys, "show", "radial", "--grid", "1,64,64")
    assert {order for row in shown["layers"] for order in row["orders"]} == {str(TileOrder(1, 8, 8))}
    video = told(capsys, "show", "radial", "--grid", "2,64,64")
    assert {order for row in video["layers"] for order in row["orders"]} == {str(RasterOrder())}


def test_explain_says_where_there_is_no_kernel() -> None:
    plan = preset("window")
    shape = shape_for(plan, model_shape="WanTransformer3DModel", height=480, width=832, num_frames=81)
    found = explain(plan, shape, device=CPU, dtype=torch.float64)
    assert found.call_density == [1.0]
    assert "got torch.float64" in str(found.layers[0].phases[0].dense_because)
    assert explain(plan, shape, device=CPU, dtype=torch.float64, backend="reference").call_density[0] < 1
