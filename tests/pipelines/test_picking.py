"""Plans whose blocks are picked from q and k while the model runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffsparse.blocks import BlockIndex
from diffsparse.entry import Execution, HeadEntry
from diffsparse.kernels import register_selector, register_signal, select_blocks
from diffsparse.kernels import sparse_attention as attention
from diffsparse.kernels.select import pick
from diffsparse.kernels.select.signals import block_means
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.online import OnlineRepair
from diffsparse.order import AxisOrder, RasterOrder, TileOrder
from diffsparse.patterns import Full, Window
from diffsparse.pipelines import architecture_of, sparse_attention, sparse_attention_summary, tap_attention
from diffsparse.pipelines.picking import PickStore
from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.published import PUBLISHED
from diffsparse.schedule import Schedule
from diffsparse.selection import RULES, Budget, OnlineSelection
from tests.pipelines import zoo_video
from tests.pipelines.models import CASES, generate, run, wan, wan_inputs, wan_pipeline, with_large_logits
from tests.tolerance import GENERATION, MODEL, assert_near

pytestmark = pytest.mark.usefixtures("no_more_rules")

#: No text, text after the video, and before it; the second one's batch has two items, of which one has less text.
MODELS = ("wan", "hunyuan", "flux")
STEPS = 8


@pytest.fixture(autouse=True)
def _rules(no_more_rules: None) -> Iterator[None]:
    def every_third(q, k, tokens, budget, *, first=0):  # type: ignore[no-untyped-def]
        """Depends on the data by its sign alone, and is not the same for all items."""
        n = tokens.num_blocks
        block = torch.arange(n, device=q.device)
        shift = (block_means(q, tokens).sum(3) > 0).long()  # [B, H, N]
        mask = (block[None, :] + block[:, None] + shift[..., None] + int(first)) % 3 == 0
        return BlockIndex.from_mask(mask, tokens)

    def farthest(q, k, tokens, scale, *, power=1.0):  # type: ignore[no-untyped-def]
        return torch.cdist(block_means(q, tokens), block_means(k, tokens)) ** power

    register_selector("every_third", every_third, {"first": 0})
    register_signal("farthest", farthest, {"power": 1.0})
    yield


def entries() -> tuple[HeadEntry, ...]:
    """Heads of every kind: with a rule, without one, left out; rules within a pattern, with tails, in other orders."""
    return (
        HeadEntry(TileOrder(1, 8, 8), Full(), OnlineSelection("every_third", Budget("density", 0.5))),
        HeadEntry(AxisOrder("HWF"), Window((1, 0.7, 0.7)), OnlineSelection("farthest", Budget("top_k", 2))),
        HeadEntry(TileOrder(1, 8, 8), Window((1, 3, 3))),
        HeadEntry(
            RasterOrder(), Full(), OnlineSelection("pooled", Budget("top_p", 0.6, most=0.7)), Execution(tail="mean")
        ),
        HeadEntry(execution=Execution("skip"), selection=OnlineSelection("pooled", Budget())),
        HeadEntry(
            TileOrder(1, 8, 8),
            Full(),
            OnlineSelection("every_third", Budget("density", 0.5), (("first", 1),)),
            Execution(tail="moments"),
        ),
    )


def picking_plan(model: torch.nn.Module, schedule: Schedule | None = None, change: Any = lambda e: e) -> SparsityPlan:
    architecture, known = architecture_of(model), tuple(change(entry) for entry in entries())
    phases = (schedule or Schedule()).num_phases
    table = {
        name: [[known[(2 * i + h + p) % len(known)] for h in range(architecture.heads)] for p in range(phases)]
        for i, name in enumerate(architecture.layers)
    }
    return SparsityPlan.from_table(table, schedule=schedule or Schedule(), architecture=architecture)


def layout_by_hand(plan: SparsityPlan, phase: int, call: Any, before: BlockLayout | None = None) -> BlockLayout | None:
    """One call's blocks, head by head from ``select_blocks``; among those of ``before``, if there were any."""
    found = plan.layer_entries(phase, call.layer, call.q.shape[2])
    if found is None:
        return None
    static = build_layout(call.grid, [replace(entry, selection="static") for entry in found], plan.block_size)
    mask = static.index.mask().repeat(call.q.shape[0], 1, 1, 1)
    if before is not None:
        static = replace(static, index=BlockIndex._from_final_mask(mask & before.index.mask()))
    for h, entry in enumerate(found):
        if (rule := entry.online) is not None:
            picked = select_blocks(
                rule.rule,
                call.q,
                call.k,
                static,
                rule.budget,
                v=call.v,
                scale=call.scale,
                within=True,
                **dict(rule.parameters),
            )
            mask[:, h] = picked.index.mask()[:, h]
    return replace(static, index=BlockIndex._from_final_mask(mask))


def by_hand(plan: SparsityPlan, seen: list[float] | None = None) -> Callable[[Any], torch.Tensor | None]:
    def callback(call: Any) -> torch.Tensor | None:
        phase = plan.schedule.phase(call.noise_level)
        layout = None if phase is None else layout_by_hand(plan, phase, call)
        if layout is None:
            return None
        if seen is not None:
            seen.append(density_by_hand(layout))
        if plan.online_repair is not None:
            layout = replace(layout, heads=replace(layout.heads, repair=plan.online_repair))
        return attention(call.q, call.k, call.v, layout, scale=call.scale, kv_len=call.kv_len)

    return callback


def density_by_hand(layout: BlockLayout) -> float:
    mask, total = layout.index.mask().double(), 0.0
    for h in range(layout.num_heads):
        lengths = layout.tokens.lengths()[layout.tokens.head_order[h]].double()
        kept = float((lengths @ mask[:, h] @ lengths).mean()) / layout.seq_len**2
        tail = {0: 0.0, 1: 1.0, 2: 1.5}[int(layout.heads.table[h, 1])] * layout.num_blocks / layout.seq_len
        total += min(1.0, kept + tail) if mask[:, h].any() else 0.0
    return total / layout.num_heads


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with a batch of two, as guidance in one batch has them; the second item is another one."""
    out = dict(inputs)
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        if isinstance(value := inputs.get(name), torch.Tensor) and value.shape[0] == 1:
            out[name] = torch.cat([value, torch.randn_like(value)])
    for name in ("timestep", "guidance"):
        if isinstance(value := inputs.get(name), torch.Tensor) and value.shape[0] == 1:
            out[name] = value.repeat(2)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_that_a_rule_picks_are_those_that_run(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(), doubled(case.inputs(*case.shapes[0]))
    dense, plan, densities = run(model, inputs), picking_plan(model), []
    with tap_attention(model, by_hand(plan, densities)):
        wanted = run(model, inputs)
    with sparse_attention(model, plan):
        assert torch.equal(run(model, inputs), wanted)
        summary = sparse_attention_summary(model)
    assert not torch.equal(wanted, dense)
    assert torch.equal(run(model, inputs), dense)
    told = summary.transformers["transformer"]
    assert told.dense_calls == 0 and told.sparse_calls == len(case.layers)
    assert told.call_density == pytest.approx(sum(densities) / len(densities), abs=1e-6)
    for rule in {str(entry.online) for entry in plan.entries if entry.online is not None}:
        assert f"blocks are picked while the model runs: {rule}" in str(summary)
        assert rule in json.loads(json.dumps(summary.to_dict()))["transformers"]["transformer"]["rules"]


def test_the_summary_tells_what_picking_took() -> None:
    model = wan()
    inputs = wan_inputs(3, 16, 16, timestep=500)
    rule = SparsityPlan.uniform(HeadEntry(selection=OnlineSelection("pooled", Budget("density", 0.5))))
    with sparse_attention(model, rule):
        run(model, inputs)
        summary = sparse_attention_summary(model)
    found = summary.transformers["transformer"]
    assert found.seconds is not None and found.pick_seconds is not None and 0 < found.pick_seconds < found.seconds
    assert found.pick_seconds == pytest.approx(sum(layer.pick_seconds or 0.0 for layer in found.layers))
    assert found.timed_calls == found.sparse_calls
    assert f"{found.pick_seconds:.3f} s of it to pick blocks" in str(summary)
    assert summary.to_dict()["transformers"]["transformer"]["pick_seconds"] == found.pick_seconds
    with sparse_attention(model, preset("window")):
        run(model, inputs)
        assert sparse_attention_summary(model).transformers["transformer"].pick_seconds is None
        assert "to pick blocks" not in str(sparse_attention_summary(model))


@pytest.mark.slow(reason="compiles a model")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_run_them_too(name: str, backend: str, fresh_dynamo: None) -> None:
    case = CASES[name]
    model, inputs = case.build(), doubled(case.inputs(*case.shapes[0]))
    plan = picking_plan(model)
    with sparse_attention(model, plan):
        wanted = run(model, inputs)
        before = sparse_attention_summary(model).transformers["transformer"]
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    dense = run(model, inputs)
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), wanted, MODEL)
        told = sparse_attention_summary(model).transformers["transformer"]
    assert told.backends == {"compiled": len(case.layers)}
    assert told.density == pytest.approx(before.density, abs=0.05)  # scores that are nearly equal may change places
    assert torch.equal(run(model, inputs), dense)


@pytest.mark.slow(reason="compiles a model")
def test_compiled_layers_share_a_graph(fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, inputs = wan(layers=6), wan_inputs(3, 7, 9)
    plan = picking_plan(model)
    with sparse_attention(model, plan):
        wanted = run(model, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), wanted, MODEL)
        assert counter.frame_count == 1
        run(model, wan_inputs(3, 9, 7))
        assert counter.frame_count <= 2


def ruled(name: str) -> SparsityPlan:
    """A plan for any model, with one of the library's rules, and room for rows of different lengths."""
    # Blocks of a model with random weights are not alike in themselves: all would be kept for that.
    parameters = (("similarity", -1),) if name == "self_similar" else ()
    rule = OnlineSelection(name, Budget("top_p", 0.6, least=0.2, most=0.7), parameters)
    return SparsityPlan.uniform(HeadEntry(TileOrder(1, 8, 8), selection=rule, execution=Execution(tail="mean")))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_every_rule_runs_in_a_model(model: str, name: str) -> None:
    case, plan = CASES[model], ruled(name)
    transformer, inputs = case.build(), doubled(case.inputs(*case.shapes[0]))
    with tap_attention(transformer, by_hand(plan)):
        wanted = run(transformer, inputs)
    with sparse_attention(transformer, plan):
        assert torch.equal(run(transformer, inputs), wanted)
        told = sparse_attention_summary(transformer).transformers["transformer"]
    assert told.dense_calls == 0 and 0 < told.density < 1


@pytest.mark.slow(reason="compiles a model")
@pytest.mark.parametrize("name", RULES)
def test_every_rule_runs_in_a_compiled_model(name: str, fresh_dynamo: None) -> None:
    model, inputs, plan = wan(), wan_inputs(3, 7, 9), ruled(name)
    with sparse_attention(model, plan):
        wanted = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), wanted, MODEL)


@pytest.mark.parametrize("name", [*PUBLISHED, "online"])
@pytest.mark.parametrize("model", MODELS)
def test_every_published_method_runs_in_a_model(model: str, name: str) -> None:
    case = CASES[model]
    transformer, inputs = case.build(), doubled(case.inputs(*case.shapes[0]))
    dense, plan = run(transformer, inputs), preset(name, images=model == "flux", sparse_below=1.0, block_size=64)
    with tap_attention(transformer, by_hand(plan)):
        wanted = run(transformer, inputs)
    with sparse_attention(transformer, plan):
        assert_near(run(transformer, inputs), wanted, MODEL)
        told = sparse_attention_summary(transformer).transformers["transformer"]
    assert torch.isfinite(wanted).all() and torch.equal(run(transformer, inputs), dense)
    assert told.plan == f"preset {name!r}" and told.sparse_calls + told.dense_calls == len(case.layers)
    assert 0 < told.density <= 1


@pytest.mark.slow(reason="compiles a model")
@pytest.mark.parametrize("name", [*PUBLISHED, "online"])
def test_every_published_method_runs_in_a_compiled_pipeline(name: str, fresh_dynamo: None) -> None:
    pipe = wan_pipeline()
    with pipe.sparse_attention(name):
        wanted = generate(pipe, STEPS)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with pipe.sparse_attention(name):
        assert_near(generate(pipe, STEPS), wanted, GENERATION)


def test_online_goes_through_its_phases_in_thirty_layers_with_large_logits() -> None:
    pipe, plan, seen = wan_pipeline(layers=30), preset("online", repair_rows=0), []  # type: ignore[var-annotated]
    with_large_logits(pipe.transformer)
    shape = {"height": 96, "width": 160, "frames": 13}  # 4 x 6 x 10 tokens
    with tap_attention(pipe, by_hand(plan, seen)):
        expected = generate(pipe, STEPS, **shape)
    # Two calls a step and layer; the densities are those of the phases, and fall.
    steps = torch.tensor(seen).view(STEPS, -1).mean(1)
    assert steps[0] > steps[STEPS // 2] > steps[-1]
    with pipe.sparse_attention(plan):
        assert torch.equal(generate(pipe, STEPS, **shape), expected)
        told = pipe.sparse_attention_summary().transformers["transformer"]
    assert told.dense_calls == 0 and told.density == pytest.approx(float(steps.mean()))


def test_online_with_its_repair_in_a_model_that_needs_an_image() -> None:
    model, inputs, plan = zoo_video.wan(**zoo_video.I2V), zoo_video.wan_i2v_inputs(4, 6, 10), preset("online")
    with tap_attention(model, by_hand(plan)):
        expected = run(model, inputs)
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), expected, MODEL)
        told = sparse_attention_summary(model).transformers["transformer"]
    assert told.dense_calls == 0 and not torch.equal(run(model, inputs), expected)


def test_beside_an_online_repair_and_a_dense_kernel() -> None:
    model, inputs = wan(), wan_inputs(3, 7, 9)
    plan = replace(picking_plan(model), repair=OnlineRepair(16))
    with tap_attention(model, by_hand(plan)):
        wanted = run(model, inputs)
    with sparse_attention(model, plan):
        assert torch.equal(run(model, inputs), wanted)
    with sparse_attention(model, plan, dense_backend="fastest"):
        assert_near(run(model, inputs), wanted, MODEL)


def test_a_plan_for_any_model_that_may_keep_everything_runs_by_its_rule() -> None:
    """The most that its budget allows is everything, which must not make the layer dense."""
    model, inputs = wan(), wan_inputs(3, 7, 9)
    rule = OnlineSelection("pooled", Budget("top_p", 0.5))
    plan = SparsityPlan.uniform(HeadEntry(TileOrder(1, 8, 8), selection=rule))
    with sparse_attention(model, plan):
        run(model, inputs)
        told = sparse_attention_summary(model).transformers["transformer"]
    assert told.dense_calls == 0 and 0 < told.density < 0.95
    everything = replace(rule, budget=Budget("density", 1.0))
    with sparse_attention(model, SparsityPlan.uniform(HeadEntry(selection=everything))):
        run(model, inputs)
        told = sparse_attention_summary(model).transformers["transformer"]
    assert told.sparse_calls == 0 and "every block is kept on this grid" in str(told.dense_reasons)


def test_an_entry_without_its_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no selector 'gone'"):
        OnlineSelection("gone")
    with pytest.raises(ValueError, match="'every_third' picks blocks by itself: its budget must be of kind 'density'"):
        OnlineSelection("every_third", Budget("top_p", 0.9))


# -- cadence -----------------------------------------------------------------------------------------------------------


def often(cadence: Any) -> Callable[[HeadEntry], HeadEntry]:
    def change(entry: HeadEntry) -> HeadEntry:
        rule = entry.selection
        return replace(entry, selection=replace(rule, cadence=cadence)) if not isinstance(rule, str) else entry

    return change


def remembering(plan: SparsityPlan, cadence: Any) -> Callable[[Any], torch.Tensor | None]:
    """What a cadence means: by branch (calls of a layer at one level), layer and phase, blocks and when."""
    held: dict[Any, tuple[float, int, BlockLayout]] = {}
    calls: dict[Any, int] = {}

    def callback(call: Any) -> torch.Tensor | None:
        phase = plan.schedule.phase(call.noise_level)
        if phase is None:
            held.clear()
            return None
        branch = calls.get((call.layer, call.noise_level), 0)
        calls[call.layer, call.noise_level] = branch + 1
        known = held.get((branch, call.layer))
        due = known is None or known[1] != phase or cadence == "shrink"
        before = known[2] if known is not None and known[1] == phase and cadence == "shrink" else None
        if known is not None and not isinstance(cadence, str):
            due = due or any(call.noise_level <= at < known[0] for at in cadence)
        if due:
            layout = layout_by_hand(plan, phase, call, before)
            assert layout is not None
            held[branch, call.layer] = (call.noise_level, phase, layout)
        layout = held[branch, call.layer][2]
        return attention(call.q, call.k, call.v, layout, scale=call.scale, kv_len=call.kv_len)

    return callback


@pytest.mark.parametrize("cadence", ["once", (0.8, 0.5), (0.99,), "shrink"])
@pytest.mark.parametrize("bounds", [(), (0.6,)])
def test_blocks_serve_as_many_steps_as_the_plan_says(cadence: Any, bounds: tuple[float, ...]) -> None:
    pipe = wan_pipeline()
    schedule = Schedule(sparse_below=0.95, phase_bounds=bounds)
    plan = picking_plan(pipe.transformer, schedule, often(cadence))
    every = picking_plan(pipe.transformer, schedule)
    with tap_attention(pipe, remembering(plan, cadence)):
        wanted = generate(pipe, STEPS)
    with pipe.sparse_attention(every):
        other = generate(pipe, STEPS)
    with pipe.sparse_attention(plan):
        found = generate(pipe, STEPS)
        store = pipe.transformer._diffsparse_root.reuse.picks
        assert (store.served > 0) == (cadence != "shrink") and store.peak > 0 and store.nbytes == 0
        told = str(pipe.sparse_attention_summary())
        assert torch.equal(generate(pipe, STEPS), found)  # nothing of a generation reaches the next one
    assert_near(found, wanted, GENERATION)
    if isinstance(cadence, str):  # picked more often, the same blocks may come out
        assert (found - other).abs().max() > 1e-3
    assert "picked blocks that serve several steps: at most" in told


def test_what_was_left_out_stays_out() -> None:
    pipe = wan_pipeline()
    rule = OnlineSelection("sampled_max", Budget("weight", 0.1), cadence="shrink")
    plan = SparsityPlan.uniform(HeadEntry(TileOrder(1, 8, 8), selection=rule), schedule=Schedule(sparse_below=0.95))
    seen: dict[Any, list[torch.Tensor]] = {}
    pick = PickStore.pick

    def watched(self: PickStore, step: Any, layer: int, *rest: Any) -> Any:
        found = pick(self, step, layer, *rest)
        seen.setdefault((step.branch, layer), []).append(found[0].mask())
        return found

    with pytest.MonkeyPatch.context() as patch, pipe.sparse_attention(plan):
        patch.setattr(PickStore, "pick", watched)
        generate(pipe, STEPS)
    assert len(seen) > 1 and min(map(len, seen.values())) > 3
    for masks in seen.values():
        assert all(not (later & ~sooner).any() for sooner, later in zip(masks, masks[1:]))
    assert any(masks[-1].sum() < masks[0].sum() for masks in seen.values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_of_a_generation_that_failed_serves_another(error: type[BaseException]) -> None:
    pipe = wan_pipeline()
    plan = picking_plan(pipe.transformer, change=often("once"))
    pipe.enable_sparse_attention(plan)
    expected = generate(pipe, STEPS, seed=1)

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 3:
            raise error
        return {}

    with pytest.raises(error):
        generate(pipe, STEPS, callback_on_step_end=stop)
    assert pipe.transformer._diffsparse_root.reuse.picks.nbytes > 0
    assert torch.equal(generate(pipe, STEPS, seed=1), expected)


def test_without_a_scheduler_blocks_are_picked_in_every_call(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = wan(), wan_inputs(3, 7, 9)
    plan = picking_plan(model, change=often("once"))
    with sparse_attention(model, picking_plan(model)):
        wanted = run(model, inputs)
    with sparse_attention(model, plan):
        run(model, wan_inputs(3, 7, 9, timestep=700))
        assert torch.equal(run(model, inputs), wanted)
    assert caplog.text.count("blocks are picked in every call") == 1


@pytest.mark.slow(reason="compiles a model")
def test_kept_blocks_in_compiled_code(fresh_dynamo: None) -> None:
    pipe = wan_pipeline()
    plan = picking_plan(pipe.transformer, Schedule(sparse_below=0.95), often((0.5,)))
    with pipe.sparse_attention(plan):
        wanted = generate(pipe, STEPS)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with pipe.sparse_attention(plan):
        assert_near(generate(pipe, STEPS), wanted, GENERATION)
        assert pipe.transformer._diffsparse_root.reuse.picks.served > 0


@pytest.mark.parametrize("kind", ["top_p_heads", "quantile_heads", "recall_heads"])
def test_heads_share_a_budget_in_a_model(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many heads are scored at a time, and beside heads without a rule."""
    model, inputs = wan(), wan_inputs(3, 7, 9)
    rule, heads = OnlineSelection("pooled", Budget(kind, 0.4)), architecture_of(model).heads
    picked = HeadEntry(TileOrder(1, 8, 8), selection=rule)
    table = [[picked if h != 1 else HeadEntry() for h in range(heads)]]
    architecture = architecture_of(model)
    plan = SparsityPlan.from_table(dict.fromkeys(architecture.layers, table), architecture=architecture)

    def callback(call: Any) -> torch.Tensor:
        found = plan.layer_entries(0, call.layer, heads)
        assert found is not None
        static = build_layout(call.grid, [replace(entry, selection="static") for entry in found], plan.block_size)
        others = [h for h in range(heads) if h != 1]
        part = static.of_heads(others)
        q, k = (x[:, :, others] for x in (call.q, call.k))
        mask = static.index.mask().repeat(call.q.shape[0], 1, 1, 1)
        mask[:, others] = select_blocks("pooled", q, k, part, rule.budget, scale=call.scale).index.mask()
        layout = replace(static, index=BlockIndex._from_final_mask(mask))
        return attention(call.q, call.k, call.v, layout, scale=call.scale, kv_len=call.kv_len)

    with tap_attention(model, callback):
        wanted = run(model, inputs)
    for at_a_time in (1, 2**26):
        monkeypatch.setattr(pick, "_AT_A_TIME", at_a_time)
        with sparse_attention(model, plan):
            assert_near(run(model, inputs), wanted, MODEL)
            told = sparse_attention_summary(model).transformers["transformer"]
        assert told.dense_calls == 0 and 0 < told.density < 1


def test_outputs_that_are_used_again_leave_their_heads_out() -> None:
    """A head whose output serves has nothing to pick; the others of its layer do."""
    pipe = wan_pipeline()

    def change(entry: HeadEntry) -> HeadEntry:
        entry = often("once")(entry)
        if entry.online is None or entry.online.rule == "farthest":
            return entry
        return replace(entry, execution=replace(entry.execution, reuse=0.2))

    plan = picking_plan(pipe.transformer, change=change)
    with pipe.sparse_attention(plan):
        found = generate(pipe, STEPS)
        told = pipe.sparse_attention_summary().transformers["transformer"]
        assert told.reused_heads > 0 and torch.isfinite(found).all()
        store = pipe.transformer._diffsparse_root.reuse
        assert store.picks.nbytes == store.nbytes == 0
