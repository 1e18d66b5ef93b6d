"""Enabling, disabling, refusing, copying; whatever else happens to a model in between."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import diffsparse
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.pipelines import (
    Family,
    UnsupportedModelError,
    architecture_of,
    disable_sparse_attention,
    enable_sparse_attention,
    find_transformers,
    register_family,
    sparse_attention,
    sparse_attention_summary,
    tap_attention,
)
from diffsparse.pipelines import family as families
from diffsparse.pipelines.context import CTX
from diffsparse.plan import PlanError, SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.schedule import Schedule
from tests.helpers.process import run_python
from tests.pipelines.models import (
    CASES,
    ENTRIES,
    flux,
    flux_inputs,
    hunyuan,
    hunyuan_inputs,
    masked_attention,
    mixed_plan,
    run,
    wan,
    wan_inputs,
)
from tests.tolerance import MODEL, assert_near

SHAPE = (3, 7, 9)


def reasons(model: torch.nn.Module) -> dict[str, int]:
    return sparse_attention_summary(model).transformers["transformer"].dense_reasons


def test_enable_twice_raises() -> None:
    model = wan()
    enable_sparse_attention(model, "window")
    with pytest.raises(RuntimeError, match=r"already enabled.*disable_sparse_attention first"):
        enable_sparse_attention(model, "window")
    disable_sparse_attention(model)
    disable_sparse_attention(model)  # nothing to do
    enable_sparse_attention(model, "window")


def test_context_manager_disables_after_an_error() -> None:
    model = wan()
    with pytest.raises(KeyError), sparse_attention(model, "window") as same:
        assert same is model
        raise KeyError
    assert not sparse_attention_summary(model).enabled
    assert str(sparse_attention_summary(model)) == "sparse attention is not enabled"


def test_plans_by_name(tmp_path: Path) -> None:
    model = wan()
    for name in ("dense", "window", "radial", "conservative"):
        with sparse_attention(model, name):
            assert name in sparse_attention_summary(model).transformers["transformer"].plan
    mixed_plan(model).save_pretrained(tmp_path / "plan")
    for plan in (tmp_path / "plan", str(tmp_path / "plan")):
        with sparse_attention(model, plan):
            assert sparse_attention_summary(model).transformers["transformer"].plan == str(plan)
    with pytest.raises(PlanError):
        enable_sparse_attention(model, tmp_path)
    with pytest.raises(TypeError, match="int"):
        enable_sparse_attention(model, 3)
    with pytest.raises(ValueError, match=r"transformer_3.*there are transformer"):
        enable_sparse_attention(model, {"transformer_3": "window"})
    with pytest.raises(ValueError, match="empty"):
        enable_sparse_attention(model, {})
    assert not sparse_attention_summary(model).enabled


def test_unknown_backend_is_refused() -> None:
    model = wan()
    with pytest.raises(ValueError, match="unknown backend 'magic'"):
        enable_sparse_attention(model, "window", backend="magic")
    assert not sparse_attention_summary(model).enabled


def test_unknown_model_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Linear has no family. `diffsparse models` lists .*register_family"
    ):
        enable_sparse_attention(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a diffusers pipeline or a transformer, got int"):
        enable_sparse_attention(3)


def test_plan_for_another_model_is_refused_with_the_difference() -> None:
    plan = mixed_plan(wan(layers=3))
    model = wan()
    with pytest.raises(PlanError, match=r"layers: the plan has 3, the model 2 \(the model lacks blocks.2.attn1\)"):
        enable_sparse_attention(model, plan)
    with pytest.raises(PlanError, match=r"model_class: .*WanTransformer3DModel.*FluxTransformer2DModel"):
        enable_sparse_attention(flux(), plan)
    unsigned = SparsityPlan.from_table({"blocks.7.attn1": [[HeadEntry()] * 3]})
    with pytest.raises(PlanError, match=r"names blocks\.7\.attn1"):
        enable_sparse_attention(model, unsigned)
    with pytest.raises(PlanError, match=r"names blocks\.9\.attn1"):
        enable_sparse_attention(model, preset("window", dense_layers=("blocks.9.attn1",)))
    with pytest.raises(PlanError, match="heads: the plan has 3, the model 4"):
        enable_sparse_attention(wan(num_attention_heads=4), replace(mixed_plan(model), architecture=None))
    assert not sparse_attention_summary(model).enabled
    run(model, wan_inputs(*SHAPE))


def test_not_strict_skips_and_lists() -> None:
    big, model = wan(layers=3), wan()
    inputs = wan_inputs(*SHAPE)
    plan = mixed_plan(big)
    fitting = SparsityPlan.from_table(
        {n: [plan.layer_entries(0, n, 3)] for n in ("blocks.0.attn1", "blocks.1.attn1")}  # type: ignore[list-item]
    )
    with sparse_attention(model, fitting):
        expected = run(model, inputs)
    with sparse_attention(model, plan, strict=False):
        assert torch.equal(run(model, inputs), expected)
        found = sparse_attention_summary(model).transformers["transformer"]
        assert found.skipped == {"blocks.2.attn1": "the model lacks this layer"}
        assert "skipped blocks.2.attn1" in str(sparse_attention_summary(model))
    with sparse_attention(big, fitting):  # a plan may leave layers out
        run(big, inputs)
        assert reasons(big) == {"dense layer of the plan": 1}
    other = wan(num_attention_heads=4)
    dense = run(other, inputs)
    with sparse_attention(other, plan, strict=False):
        assert torch.equal(run(other, inputs), dense)
        assert list(reasons(other)) == ["the plan has 3 heads, the model 4"]


def test_deepcopy_pickle_and_torch_save() -> None:
    model = wan()
    inputs = wan_inputs(*SHAPE)
    dense = run(model, inputs)
    enable_sparse_attention(model, mixed_plan(model))
    sparse = run(model, inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert torch.equal(run(twin, inputs), sparse)
        state, other = model._diffsparse_root, twin._diffsparse_root
        assert state is not other and state.layouts is not other.layouts
        assert all(a is twin.get_submodule(a.name)._diffsparse for a in other.layers)
        disable_sparse_attention(twin)
        assert torch.equal(run(twin, inputs), dense)
    assert torch.equal(run(model, inputs), sparse)
    assert sparse_attention_summary(model).transformers["transformer"].forwards == 2


def test_pickle_in_a_fresh_process(tmp_path: Path) -> None:
    model = wan()
    inputs = wan_inputs(*SHAPE)
    enable_sparse_attention(model, mixed_plan(model))
    torch.save((model, inputs, run(model, inputs)), tmp_path / "model.pt")
    run_python(
        "import torch\n"
        "from tests.tolerance import MODEL, assert_near\n"
        f"model, inputs, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "with torch.no_grad():\n"
        "    assert_near(model(**inputs)[0], expected, MODEL)\n"  # other threads
        "found = model._diffsparse_root.counts\n"
        "assert [count.sparse_calls for count in found] == [2, 2], found\n"
    )


def test_save_pretrained_is_unchanged(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = wan()
    inputs = wan_inputs(*SHAPE)
    dense = run(model, inputs)
    model.save_pretrained(tmp_path / "dense")
    enable_sparse_attention(model, mixed_plan(model))
    run(model, inputs)
    model.save_pretrained(tmp_path / "sparse")
    files = sorted(p.name for p in (tmp_path / "dense").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "sparse").iterdir())
    for name in files:
        assert (tmp_path / "dense" / name).read_bytes() == (tmp_path / "sparse" / name).read_bytes()
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "sparse")
    assert not sparse_attention_summary(loaded).enabled
    assert torch.equal(run(loaded.eval(), inputs), dense)


def test_two_models_in_two_threads() -> None:
    models = [wan(), wan(), wan()]  # the third stays dense
    shapes = [(3, 7, 9), (3, 9, 7), (3, 7, 9)]
    batches = [wan_inputs(*shape) for shape in shapes]
    enable_sparse_attention(models[0], mixed_plan(models[0]))
    enable_sparse_attention(models[1], mixed_plan(models[1], shift=2))
    expected = [run(model, inputs) for model, inputs in zip(models, batches)]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(15):
            if not torch.equal(run(models[i], batches[i]), expected[i]):
                wrong.append(f"model {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for i in (0, 1):
        found = sparse_attention_summary(models[i]).transformers["transformer"]
        assert found.forwards == 16 and found.sparse_calls == 32


def test_one_model_in_two_threads_with_two_resolutions() -> None:
    model = wan()
    batches = [wan_inputs(3, 7, 9), wan_inputs(3, 9, 7)]
    enable_sparse_attention(model, mixed_plan(model))
    expected = [run(model, inputs) for inputs in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(15):
            if not torch.equal(run(model, batches[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sparse_attention_summary(model).transformers["transformer"].grids == {"3x7x9": 16, "3x9x7": 16}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["blocks.1.attn1.to_q", "blocks.1.ffn"])
def test_an_exception_leaves_models_usable(error: type[BaseException], where: str) -> None:
    model, other = wan(), wan(1)
    inputs = wan_inputs(*SHAPE)
    dense = run(other, inputs)
    enable_sparse_attention(model, mixed_plan(model))
    expected = run(model, inputs)

    def fail(*_: Any) -> None:
        raise error

    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(error):
        run(model, inputs)
    handle.remove()
    # Neither its own layers nor those of a model that was never enabled take part in the forward that is gone.
    alone = torch.randn(1, 189, 48)
    with torch.no_grad():
        assert torch.equal(other.blocks[1].attn1(alone), wan(1).blocks[1].attn1(alone))
    assert torch.equal(run(other, inputs), dense)
    assert torch.equal(run(model, inputs), expected)
    assert CTX.layer is None and CTX.call is None
    disable_sparse_attention(model)
    assert torch.equal(run(model, inputs), run(wan(), inputs))


def test_phases_follow_the_noise_level() -> None:
    schedule = Schedule(sparse_below=0.9, dense_below=0.1, phase_bounds=(0.5,), dense_layers=("blocks.1.attn1",))
    model = wan()
    plan = mixed_plan(model, schedule)
    batches = [wan_inputs(*SHAPE, timestep=t) for t in (1000, 900.5, 900, 501, 500, 101, 100, 0)]
    with tap_attention(model, masked_attention(plan)):
        expected = [run(model, inputs) for inputs in batches]
    dense = [run(model, inputs) for inputs in batches]
    enable_sparse_attention(model, plan)
    for inputs, wanted in zip(batches, expected):
        assert_near(run(model, inputs), wanted, MODEL)
    for i in (0, 1, 6, 7):
        assert torch.equal(run(model, batches[i]), dense[i])
    assert sparse_attention_summary(model).transformers["transformer"].sparse_calls == 4
    assert reasons(model) == {
        "noise level outside the plan's sparse range": 16,
        "dense layer of the plan": 4,
    }


def test_noise_level_takes_any_form_of_timestep() -> None:
    model = wan()
    levels: list[float] = []
    with tap_attention(model, lambda call: levels.append(call.noise_level)):
        inputs = wan_inputs(*SHAPE)
        for timestep in (torch.tensor([300]), torch.tensor([300.0], dtype=torch.bfloat16)):
            run(model, {**inputs, "timestep": timestep})
        per_token = torch.full((1, 189), 300.0)
        per_token[:, :63] = 0  # image-to-video holds the first frame
        run(model, {**inputs, "timestep": per_token})
        with torch.no_grad():
            model(inputs["hidden_states"], torch.tensor([300]), inputs["encoder_hidden_states"])
    assert levels == pytest.approx([0.3] * 8)


@pytest.mark.parametrize("scale", ["unit", "unit_rising"])
def test_the_noisiest_of_several_timesteps_counts(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    known = families.family_by_class("WanTransformer3DModel")
    register_family(replace(known, timestep_scale=scale), replace=True)
    levels: list[float] = []
    model = wan()
    with tap_attention(model, lambda call: levels.append(call.noise_level)):
        values = torch.full((1, 189), 0.7 if scale == "unit" else 0.3)
        values[:, :63] = 0.0 if scale == "unit" else 1.0
        run(model, {**wan_inputs(*SHAPE), "timestep": values})
    assert levels == pytest.approx([0.7] * 2)


def test_gradients_run_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = wan()
    inputs = wan_inputs(*SHAPE)
    dense = run(model, inputs)
    enable_sparse_attention(model, "window")
    with caplog.at_level(logging.WARNING, logger="diffsparse"):
        for _ in range(2):
            model(**inputs)[0].sum().backward()
    assert model.blocks[0].attn1.to_q.weight.grad is not None
    assert_near(model(**inputs)[0], dense, MODEL)
    assert reasons(model) == {"gradients are needed": 6}
    assert [r.message for r in caplog.records].count(
        "transformer (WanTransformer3DModel): runs dense: gradients are needed"
    ) == 1  # fmt: skip
    with torch.inference_mode():
        assert not torch.equal(model(**inputs)[0], dense)


def test_masks_and_other_calls_run_dense() -> None:
    """Through the processor's own arguments, as a pipeline could pass them."""
    from diffsparse.pipelines.patch import routed_dispatch, routed_sdpa

    model = hunyuan()
    enable_sparse_attention(model, "window")
    inputs = hunyuan_inputs(*SHAPE)
    options: dict[str, Any] = {}

    def call_with(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        q = torch.randn(2, 196, 3, 16)
        keys = q[:, :50] if options.pop("cross", False) else q
        routed_dispatch(q, keys, keys, **options)
        transposed = (x.transpose(1, 2) for x in (q, keys, keys))
        routed_sdpa(*transposed, **options)
        return args, kwargs

    handle = model.transformer_blocks[0].attn.to_q.register_forward_pre_hook(call_with, with_kwargs=True)
    cases = {
        "causal attention": {"is_causal": True},
        "dropout": {"dropout_p": 0.1},
        "a mask that is not a key-padding mask": {"attn_mask": torch.ones(196, 196, dtype=torch.bool)},
    }
    for reason, given in cases.items():
        options.clear()
        options.update(given)
        run(model, inputs)
        assert reasons(model)[reason] == 2
    options.clear()
    options["attn_mask"] = torch.zeros(2, 1, 1, 196)  # additive
    run(model, inputs)
    assert reasons(model)["a mask that is not a key-padding mask"] == 4
    options.clear()
    options["attn_mask"] = torch.zeros(2, 1, 1, 196, dtype=torch.bool)
    run(model, inputs)
    assert any("masks out visual tokens" in reason for reason in reasons(model))
    before = sum(reasons(model).values())
    options.clear()
    options["cross"] = True
    run(model, inputs)
    assert sum(reasons(model).values()) == before  # keys of something else are not this layer's self-attention
    handle.remove()


def test_unknown_grid_runs_dense() -> None:
    model = flux()
    inputs = flux_inputs(1, 6, 8)
    inputs["img_ids"][24:, 1] += 100  # a hole in the image
    dense = run(model, inputs)
    enable_sparse_attention(model, "window")
    assert torch.equal(run(model, inputs), dense)
    (reason,) = reasons(model)
    assert reason.startswith("the token grid is unknown: 48 image tokens are not one image")
    with tap_attention(flux(), lambda call: None):
        pass
    tapped = flux()
    with tap_attention(tapped, lambda call: None), pytest.raises(ValueError, match="the token grid is unknown"):
        run(tapped, inputs)


def test_a_layer_on_its_own_runs_dense() -> None:
    model = wan()
    x = torch.randn(1, 189, 48)
    with torch.no_grad():
        dense = model.blocks[0].attn1(x)
        enable_sparse_attention(model, "window")
        assert torch.equal(model.blocks[0].attn1(x), dense)


def test_a_processor_from_elsewhere_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = wan()
    inputs = wan_inputs(*SHAPE)
    enable_sparse_attention(model, "window")

    class Mine:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden_states

    model.blocks[0].attn1.processor = Mine()
    with caplog.at_level(logging.WARNING, logger="diffsparse"):
        run(model, inputs)
    assert "no attention call was seen" in caplog.text
    layers = sparse_attention_summary(model).transformers["transformer"].layers
    assert (layers[0].sparse_calls, layers[0].dense_calls, layers[1].sparse_calls) == (0, 0, 1)
    assert layers[0].unseen_calls == 1 and not layers[0].dense_reasons


def test_carried_bitmaps_are_reported() -> None:
    from diffsparse.order import RasterOrder
    from diffsparse.patterns import Bitmap, Sink

    model = wan()
    grid = CASES["wan"].grid(SHAPE)
    mask = Sink(tokens=1).block_mask(grid, RasterOrder(), 64)
    entry = HeadEntry(pattern=Bitmap.from_mask(mask, grid, RasterOrder(), 64, fallback=Sink(tokens=1)))
    architecture = architecture_of(model)
    plan = SparsityPlan.from_table(
        {n: [[entry, ENTRIES[0], ENTRIES[0]]] for n in architecture.layers}, architecture=architecture
    )
    with sparse_attention(model, plan):
        run(model, wan_inputs(*SHAPE))
        assert not sparse_attention_summary(model).transformers["transformer"].carried
        run(model, wan_inputs(3, 9, 7))
        found = sparse_attention_summary(model).transformers["transformer"]
    assert found.carried == {"3x9x7": 2} and found.sparse_calls == 4


def test_summary_is_plain_data() -> None:
    model = wan()
    enable_sparse_attention(model, mixed_plan(model))
    for timestep in (500, 500):
        run(model, wan_inputs(*SHAPE, timestep=timestep))
    summary = sparse_attention_summary(model)
    data = json.loads(json.dumps(summary.to_dict()))
    assert data["density"] == pytest.approx(summary.density)
    assert data["transformers"]["transformer"]["layers"][1]["name"] == "blocks.1.attn1"
    assert data["transformers"]["transformer"]["backends"] == {"cpu": 4}
    for part in ("2 forwards", "blocks.0.attn1", "3x7x9 (2)", "cpu (4)"):
        assert part in str(summary)


def test_the_summary_times_every_layer_on_a_cpu() -> None:
    model = wan()
    enable_sparse_attention(model, mixed_plan(model))
    for timestep in (500, 500):
        run(model, wan_inputs(*SHAPE, timestep=timestep))
    found = sparse_attention_summary(model).transformers["transformer"]
    for layer in found.layers:
        assert layer.timed_calls == layer.sparse_calls + layer.dense_calls == 2
        assert layer.sparse_ms is not None and layer.sparse_ms > 0 and layer.dense_ms is None
        assert layer.seconds == pytest.approx(layer.sparse_ms * 2 / 1e3)
    assert found.seconds == pytest.approx(sum(layer.seconds or 0 for layer in found.layers))
    text = str(sparse_attention_summary(model))
    assert "sparse ms" in text and "time in attention" in text and "calls timed" not in text
    assert sparse_attention_summary(model).to_dict()["transformers"]["transformer"]["timed_calls"] == 4


class LateWatch:
    """A call on a device that is behind: its time is known once ``ended`` is set."""

    ended = False

    def __init__(self, *args: Any) -> None:
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True

    def seconds(self) -> float | None:
        assert self.stopped
        return 0.25 if self.ended else None


def test_times_that_are_not_known_yet_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.pipelines import call

    monkeypatch.setattr(call, "start_watch", LateWatch)
    model = wan()
    plan = mixed_plan(model)
    one_dense = replace(plan, schedule=replace(plan.schedule, dense_layers=("blocks.1.attn1",)))
    enable_sparse_attention(model, one_dense)
    run(model, wan_inputs(*SHAPE))
    before = sparse_attention_summary(model)
    assert before.transformers["transformer"].timed_calls == 0
    assert before.transformers["transformer"].seconds is None and "sparse ms" not in str(before)
    again = copy.deepcopy(model)  # watches belong to one device's stream and stay behind
    assert "dense because: dense layer of the plan, in 1 of 2 layers (1)" in str(before)
    monkeypatch.setattr(LateWatch, "ended", True)
    first, second = sparse_attention_summary(model).transformers["transformer"].layers
    assert (first.sparse_ms, first.dense_ms, second.sparse_ms, second.dense_ms) == (250.0, None, None, 250.0)
    assert sparse_attention_summary(again).transformers["transformer"].timed_calls == 0
    run(again, wan_inputs(*SHAPE))
    assert "time in attention: 0.500 s (2 of 4 calls timed)" in str(sparse_attention_summary(again))


def test_gpu_calls_are_timed_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.kernels import clock as timing

    class Event:
        marks: list[str] = []

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            self.marks.append(stream)

        def query(self) -> bool:
            return len(self.marks) > 2

        def elapsed_time(self, other: Any) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    gpu = torch.device("cuda:1")
    assert timing.start_watch(gpu, False) is None and timing.start_watch(torch.device("mps"), True) is None
    watch = timing.start_watch(gpu, True)
    assert watch is not None
    watch.stop()
    assert watch.seconds() is None and Event.marks == ["stream of cuda:1"] * 2
    Event.marks.append("later")
    assert watch.seconds() == pytest.approx(3e-3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert timing.start_watch(gpu, True) is None


@pytest.mark.gpu
def test_the_summary_times_every_layer_on_a_gpu() -> None:
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in wan_inputs(*SHAPE).items()}
    model = wan().cuda()
    plan = mixed_plan(model)
    for timing in (False, True):
        with sparse_attention(model, plan, timing=timing):
            run(model, inputs)
            torch.cuda.synchronize()
            found = sparse_attention_summary(model).transformers["transformer"]
        assert found.timed_calls == (found.sparse_calls + found.dense_calls if timing else 0)
        assert (found.seconds is not None and found.seconds > 0) == timing


def test_long_sequences_keep_their_layouts_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.pipelines.state import _is_packed

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    long, short = TokenGrid(21, 45, 80), TokenGrid(21, 30, 52)  # Wan 14B at 720p, 1.3B at 480p
    assert _is_packed(gpu, long, 40, 128) and not _is_packed(gpu, short, 12, 128)
    assert not _is_packed(cpu, long, 40, 128)

    model, inputs = wan(), wan_inputs(3, 7, 9)
    enable_sparse_attention(model, mixed_plan(model))
    expected = run(model, inputs)
    lists = model._diffsparse_root.layouts.num_bytes()
    disable_sparse_attention(model)
    enable_sparse_attention(model, mixed_plan(model))
    monkeypatch.setattr("diffsparse.pipelines.state._is_packed", lambda *_: True)
    assert torch.equal(run(model, inputs), expected)
    layouts = [x for g in model._diffsparse_root.layouts.groups.values() for x in g.values() if not isinstance(x, str)]
    assert layouts and all(layout.is_packed for layout in layouts)
    assert model._diffsparse_root.layouts.num_bytes() < lists


def test_layout_memory_is_bounded() -> None:
    model = wan()
    inputs = [wan_inputs(3, 7, w) for w in (9, 10, 11, 12)]
    enable_sparse_attention(model, mixed_plan(model))
    expected = [run(model, x) for x in inputs]
    assert len(model._diffsparse_root.layouts.groups) == 4
    disable_sparse_attention(model)
    enable_sparse_attention(model, mixed_plan(model))
    model._diffsparse_root.layouts.max_bytes = 1
    for x, wanted in zip(inputs * 2, expected * 2):
        assert torch.equal(run(model, x), wanted)
    assert len(model._diffsparse_root.layouts.groups) == 1


def test_a_family_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanTransformer3DModel

    class Mine(WanTransformer3DModel):
        pass

    torch.manual_seed(0)
    config = {k: v for k, v in wan().config.items() if not k.startswith("_")}
    model = Mine(**config).eval()
    assert architecture_of(model).model_class == "WanTransformer3DModel"  # a subclass is its parent's family
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    known = families.family_by_class("WanTransformer3DModel")
    mine = replace(known, name="mine", classes=("Mine",), layers=("blocks.*.attn1",))
    register_family(mine)
    assert architecture_of(model).model_class == "Mine"
    with pytest.raises(ValueError, match="already has a family"):
        register_family(mine)
    register_family(mine, replace=True)
    with pytest.raises(TypeError):
        register_family("mine")  # type: ignore[arg-type]
    with sparse_attention(model, mixed_plan(model)):
        run(model, wan_inputs(*SHAPE))
        assert sparse_attention_summary(model).transformers["transformer"].sparse_calls == 2
    with pytest.raises(ValueError, match="text_position"):
        Family("x", ("X",), ("a",), known.grid, known.patch_size, text_position="middle")
    register_family(replace(mine, layers=("nowhere.*",)), replace=True)
    with pytest.raises(UnsupportedModelError, match="no module at nowhere"):
        architecture_of(model)


def test_tap() -> None:
    model = wan()
    inputs = wan_inputs(*SHAPE)
    dense = run(model, inputs)
    with tap_attention(model, lambda call: call.dense()):
        assert torch.equal(run(model, inputs), dense)
        with pytest.raises(RuntimeError, match="tap"), tap_attention(model, lambda call: None):
            pass
        with pytest.raises(RuntimeError):
            enable_sparse_attention(model, "window")
        assert not sparse_attention_summary(model).enabled
        disable_sparse_attention(model)  # is not there to remove taps
        assert hasattr(model, "_diffsparse_root")
    with tap_attention(model, lambda call: torch.zeros_like(call.q)):
        assert not torch.equal(run(model, inputs), dense)
    with tap_attention(model, lambda call: call.q[:, :1]), pytest.raises(ValueError, match="returned"):
        run(model, inputs)
    assert torch.equal(run(model, inputs), dense)
    enable_sparse_attention(model, "window")
    with pytest.raises(RuntimeError, match="disable it first"), tap_attention(model, lambda call: None):
        pass


@pytest.mark.parametrize(
    "order",
    [
        "import diffsparse, diffusers; from diffusers import WanTransformer3DModel, CogVideoXTransformer3DModel",
        "from diffusers import WanTransformer3DModel, CogVideoXTransformer3DModel; import diffsparse",
    ],
)
def test_any_order_of_imports(order: str) -> None:
    run_python(
        order + "\nfrom tests.pipelines.models import CASES, run\n"
        "import diffsparse\n"
        "for name in ('wan', 'cogvideox'):\n"
        "    case = CASES[name]; model = case.build()\n"
        "    diffsparse.enable_sparse_attention(model, 'window')\n"
        "    run(model, case.inputs(*case.shapes[0]))\n"
        "    found = diffsparse.sparse_attention_summary(model).transformers['transformer']\n"
        "    assert found.sparse_calls == 2 and found.dense_calls == 0, found\n"
    )


def test_context_parallel_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.pipelines import patch

    model = wan()
    enable_sparse_attention(model, "window")
    original, seen = patch._dispatch, []

    def dispatch(*args: Any, parallel_config: Any = None, **kwargs: Any) -> torch.Tensor:
        seen.append(parallel_config)
        return original(*args, **kwargs)

    monkeypatch.setattr(patch, "_dispatch", dispatch)
    for layer in range(2):
        model.blocks[layer].attn1.processor._parallel_config = config = object()
        assert run(model, wan_inputs(*SHAPE)) is not None
        assert config in seen
    assert reasons(model) == {"context parallel": 3}


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    model = wan()
    inputs = wan_inputs(*SHAPE)
    plan = mixed_plan(model)
    enable_sparse_attention(model, plan)
    before = run(model, inputs)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with_adapter = run(model, inputs)
    assert not torch.equal(with_adapter, before)
    disable_sparse_attention(model)
    with sparse_attention(model, plan):  # enabled after the adapter was added
        assert torch.equal(run(model, inputs), with_adapter)
    model.delete_adapters("default")
    enable_sparse_attention(model, plan)
    assert_near(run(model, inputs), before, MODEL)


def test_timesteps_of_a_schedule_are_read_without_their_values() -> None:
    """On a GPU each reading of a value waits for the device; a view's offset does not."""
    from types import SimpleNamespace

    from diffsparse.pipelines.noise import _from_schedule

    scheduler = SimpleNamespace(timesteps=torch.tensor([900, 600, 300, 50]))
    state: Any = SimpleNamespace(scheduler=scheduler, schedule=None)
    for t in scheduler.timesteps:
        assert _from_schedule(state, t) == _from_schedule(state, t.expand(2)) == float(t)
    first = state.schedule
    assert _from_schedule(state, scheduler.timesteps[1]) == 600
    assert state.schedule is first  # read once
    scheduler.timesteps = torch.tensor([800, 400])[1:]
    assert _from_schedule(state, scheduler.timesteps[0]) == 400
    for other in (torch.tensor([400]), scheduler.timesteps.float(), torch.tensor([1, 2])):
        assert _from_schedule(state, other) is None
    scheduler.timesteps = torch.arange(4)
    assert _from_schedule(state, scheduler.timesteps) is None  # not one value
    with torch.inference_mode():
        scheduler.timesteps = torch.tensor([700, 100])
        assert _from_schedule(state, scheduler.timesteps[1]) == 100


def test_public_functions_are_these() -> None:
    assert diffsparse.enable_sparse_attention is enable_sparse_attention
    assert find_transformers(model := wan()) == {"transformer": model}
