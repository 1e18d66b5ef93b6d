"""Plans by name: one place says what they mean, and what nobody chose is told."""

from __future__ import annotations

import warnings

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.order import TileOrder
from diffsparse.pipelines import enable_sparse_attention, sparse_attention, sparse_attention_summary
from diffsparse.pipelines.resolve import makes_images, named_plan, resolve_plans
from diffsparse.preset_plans import PRESETS, preset
from tests.pipelines.models import flux, run, wan, wan_inputs, wan_pipeline

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("name", PRESETS)
def test_every_name_means_one_plan(name: str) -> None:
    for model, images in ((wan(), False), (flux(), True)):
        ((ran, _),) = resolve_plans(None, {"transformer": model}, name).values()
        meant = named_plan(name, type(model).__name__)
        assert ran.to_files() == meant.to_files() == preset(name, images=images).to_files()


def test_radial_is_on_tiles_for_images_alone() -> None:
    assert isinstance(named_plan("radial", "FluxTransformer2DModel").entries[0].order, TileOrder)
    assert named_plan("radial", "WanTransformer3DModel", TokenGrid(1, 30, 52)).entries[0].order.is_raster
    assert named_plan("radial").entries[0].order.is_raster
    assert makes_images("SomebodysTransformer", TokenGrid(1, 64, 64))  # of an unknown class its grid is all there is
    assert not makes_images("SomebodysTransformer", TokenGrid(2, 64, 64))


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"'spiral'; there are dense, window, radial, conservative"):
        named_plan("spiral")
    names = "'dense', 'window', 'radial', 'conservative', 'online', 'xattention'"
    with pytest.raises(TypeError, match=rf"'auto', {names}, .*, or a dict"):
        enable_sparse_attention(wan(), 3)


def test_auto_without_a_plan_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = wan_pipeline(stages=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            with pipe.sparse_attention():
                pass
        with sparse_attention(pipe.transformer):
            pass
    (one,) = [w for w in caught if "plan='auto'" in str(w.message)]
    assert issubclass(one.category, UserWarning)
    assert "no plan for WanTransformer3DModel; the preset 'online' runs" in str(one.message)
    assert "`diffsparse search MODEL --prompts" in str(one.message) and "plan='online'" in str(one.message)


def test_a_plan_that_was_asked_for_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in PRESETS:
            with sparse_attention(wan(), name):
                pass


def test_tensors_without_a_kernel_run_dense(caplog: pytest.LogCaptureFixture) -> None:
    """The reference runs whatever it is given, and slower than dense attention: only who asks for it gets it."""
    model = wan().double()
    inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in wan_inputs(3, 7, 9).items()}
    dense = run(model, inputs)
    plan = preset("window", tail="none")
    with sparse_attention(model, plan):
        assert torch.equal(run(model, inputs), dense)
        found = sparse_attention_summary(model).transformers["transformer"]
    (reason,) = found.dense_reasons
    assert found.sparse_calls == 0 and "no kernel for these tensors" in reason and "got torch.float64" in reason
    assert caplog.text.count(reason) == 1
    with sparse_attention(model, plan, backend="reference"):
        assert not torch.equal(run(model, inputs), dense)
        assert sparse_attention_summary(model).transformers["transformer"].dense_calls == 0


def test_calls_of_another_kind_than_the_parameters() -> None:
    model = wan()
    for block in model.blocks:
        block.attn1.register_forward_pre_hook(lambda module, args: (args[0].double(), *args[1:]))
        block.attn1.double()
        block.attn1.register_forward_hook(lambda module, args, output: output.float())
    inputs = wan_inputs(3, 7, 9)
    dense = run(model, inputs)
    with sparse_attention(model, preset("window", tail="none")):
        assert torch.equal(run(model, inputs), dense)
        found = sparse_attention_summary(model).transformers["transformer"]
    assert found.sparse_calls == 0 and "got torch.float64" in str(found.dense_reasons)


@pytest.mark.slow(reason="compiles a model")
def test_compiled_models_without_a_kernel() -> None:
    torch._dynamo.reset()
    model = wan().double()
    inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in wan_inputs(3, 7, 9).items()}
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with sparse_attention(model, preset("window", tail="none")):
        run(model, inputs)
        found = sparse_attention_summary(model).transformers["transformer"]
    assert (found.sparse_calls, found.dense_calls) == (0, 2) and "got torch.float64" in str(found.dense_reasons)
    torch._dynamo.reset()
