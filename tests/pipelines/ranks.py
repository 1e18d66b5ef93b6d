"""One of several processes that share a model's attention: run by ``test_parallel.py``, which reads what it prints.

``python -m tests.pipelines.ranks RANK COUNT STORE JOB``; the job is JSON: cases by name, and how.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from diffsparse.entry import Execution, HeadEntry
from diffsparse.online import OnlineRepair
from diffsparse.order import TileOrder
from diffsparse.patterns import Full
from diffsparse.pipelines import disable_sparse_attention, enable_sparse_attention, sparse_attention_summary
from diffsparse.plan import SparsityPlan
from diffsparse.schedule import Schedule
from diffsparse.selection import Budget, OnlineSelection
from tests.pipelines import models, zoo_video

TEXT, SHAPE = 12, (3, 8, 9)


def again(model: torch.nn.Module, heads: int) -> torch.nn.Module:
    """The same random model with another number of heads."""
    torch.manual_seed(0)
    config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    return type(model)(**config | {"num_attention_heads": heads}).eval()


def flux_inputs(text: int) -> dict[str, Any]:
    inputs = models.flux_inputs(1, 16, 18)
    return inputs | {"encoder_hidden_states": torch.randn(1, text, 16), "txt_ids": torch.zeros(text, 3)}


def hunyuan_inputs(text: int) -> dict[str, Any]:
    mask = torch.ones(2, text, dtype=torch.bool)
    mask[1, 4:] = False
    inputs = models.hunyuan_inputs(*SHAPE)
    return inputs | {"encoder_hidden_states": torch.randn(2, text, 16), "encoder_attention_mask": mask}


def cogvideox_inputs(text: int) -> dict[str, Any]:
    inputs = models.cogvideox_inputs(*SHAPE)
    return inputs | {"encoder_hidden_states": torch.randn(2, text, 16)}


def again_with_large_logits(model: torch.nn.Module, heads: int) -> torch.nn.Module:
    """The same, with logits as large as trained models have."""
    return models.with_large_logits(again(model, heads))


def hunyuan_cuts() -> dict[str, Any]:
    """Where HunyuanVideo's sequences are cut, for which diffusers has no plan of its own."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    cut = ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
    angles = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    return {
        "transformer_blocks.0": {"hidden_states": cut, "encoder_hidden_states": cut},
        "rope": {0: angles, 1: angles},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def cogvideox_cuts() -> dict[str, Any]:
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    cut = ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
    angles = ContextParallelInput(split_dim=0, expected_dims=2, split_output=False)
    whole = ContextParallelOutput(gather_dim=1, expected_dims=3)
    return {
        "transformer_blocks.0": {"hidden_states": cut, "encoder_hidden_states": cut},
        "transformer_blocks.*": {"image_rotary_emb": [angles, angles]},
        "transformer_blocks.1": [whole, whole],
    }


def wan_i2v() -> torch.nn.Module:
    return zoo_video.wan(**zoo_video.I2V | {"added_kv_proj_dim": 96})  # six heads of 16


Made = tuple[Callable[[], torch.nn.Module], Callable[[int], dict[str, Any]], Callable[[], Any]]
CASES: dict[str, Made] = {
    "wan_deep": (lambda: models.wan(layers=30), lambda text: models.wan_inputs(5, 6, 8), lambda: None),
    "wan_i2v": (wan_i2v, lambda text: zoo_video.wan_i2v_inputs(*SHAPE), lambda: None),
    "wan": (models.wan, lambda text: models.wan_inputs(*SHAPE), lambda: None),
    "flux": (models.flux, flux_inputs, lambda: None),
    "hunyuan": (models.hunyuan, hunyuan_inputs, hunyuan_cuts),
    "cogvideox": (models.cogvideox, cogvideox_inputs, cogvideox_cuts),
    "qwenimage": (
        models.CASES["qwenimage"].build,
        lambda text: models.CASES["qwenimage"].inputs(1, 16, 18),
        lambda: None,
    ),
}


def gather_uneven(tensors: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
    """``all_gather`` of tensors that differ in one axis, which NCCL has and gloo has not."""
    shape = [max(x.shape[i] for x in tensors) for i in range(tensor.ndim)]
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(n) for n in tensor.shape)] = tensor
    found = [torch.empty_like(padded) for _ in tensors]
    ALL_GATHER(found, padded, group=group)
    for x, whole in zip(tensors, found, strict=True):
        x.copy_(whole[tuple(slice(n) for n in x.shape)])


ALL_GATHER = dist.all_gather


def plan_for(model: torch.nn.Module, kind: str) -> SparsityPlan:
    plan = models.mixed_plan(model)
    if kind == "tails":
        entries = [replace(e, execution=replace(e.execution, tail="mean")) for e in plan.entries]
        return replace(plan, entries=tuple(entries), repair=OnlineRepair(16))
    if kind == "online":
        rule = HeadEntry(TileOrder(1, 8, 8), selection=OnlineSelection("pooled", Budget("density", 0.4)))
        return SparsityPlan.uniform(rule)
    if kind == "dense":
        return SparsityPlan.uniform(HeadEntry(TileOrder(1, 4, 16), Full(), execution=Execution(tail="none")))
    return plan


def enable_parallelism(model: Any, config: dict[str, Any], cuts: Any = None) -> None:
    """On the CPU, which diffusers has for neither: it divides by the number of accelerators, and asks for a GPU."""
    from diffusers import ContextParallelConfig
    from diffusers.hooks import tensor_parallel
    from diffusers.models._modeling_parallel import TensorParallelConfig

    known = TensorParallelConfig if "tp_degree" in config else ContextParallelConfig
    with (
        mock.patch.object(torch.accelerator, "device_count", lambda: 1),
        mock.patch.object(tensor_parallel, "_SUPPORTED_TP_DEVICES", ("cpu",)),
    ):
        model.enable_parallelism(config=known(**config), cp_plan=cuts)


def run(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """What one process gives alone, and as one of several."""
    build, inputs, cuts = CASES[name]
    model = (again_with_large_logits if name == "wan_deep" else again)(build(), job["heads"])
    plan = plan_for(model, job.get("plan", "mixed"))
    torch.manual_seed(1)
    arguments = inputs(job.get("text", TEXT))
    with torch.no_grad():
        enable_sparse_attention(model, plan, backend="cpu")
        alone = model(**copy.deepcopy(arguments))[0]
        before = sparse_attention_summary(model).transformers["transformer"]
        disable_sparse_attention(model)
        dense = model(**copy.deepcopy(arguments))[0]
        enable_parallelism(model, job["config"], cuts())
        enable_sparse_attention(model, plan, backend="cpu")
        if job.get("compile"):
            model(**copy.deepcopy(arguments))  # diffusers' hooks look up the names of arguments once, in eager code
            model.compile_repeated_blocks(backend="eager", fullgraph=True)
        together = [model(**copy.deepcopy(arguments))[0] for _ in range(2)]
        summary = sparse_attention_summary(model)
    state = summary.transformers["transformer"]
    return {
        "same": [bool(torch.equal(alone, out)) for out in together],
        "apart": float((together[0] - alone).abs().max()),
        "largest": float(alone.abs().max()),
        "sparse": float((alone - dense).abs().max()),
        "calls": state.sparse_calls,
        "reasons": {r: n for layer in state.layers for r, n in layer.dense_reasons.items()},
        "density": state.density,
        "alone": before.density,
        "text": str(summary),
    }


def run_pipeline(job: dict[str, Any]) -> dict[str, Any]:
    """A generation with a plan that reuses outputs, repairs them and picks blocks once, alone and as one of several."""
    pipe = models.wan_pipeline()
    pipe.transformer = again(pipe.transformer, job["heads"])
    schedule = Schedule(sparse_below=0.95, phase_bounds=(0.5,))
    plan = models.mixed_plan(pipe.transformer, schedule)
    found = []
    for i, entry in enumerate(plan.entries):
        if entry.execution.mode != "skip":
            entry = replace(entry, execution=replace(entry.execution, reuse=(0.0, 0.2, 0.3)[i % 3]))
        if i % 4 == 0 and entry.execution.mode != "skip":
            entry = replace(entry, selection=OnlineSelection("pooled", Budget("density", 0.5), cadence="once"))
        found.append(entry)
    plan = models.with_repair(replace(plan, entries=tuple(found)), 16)
    size = {"steps": 8, "height": 128, "width": 144}
    with torch.no_grad():
        pipe.enable_sparse_attention(plan, backend="cpu")
        alone = models.generate(pipe, **size)
        before = pipe.sparse_attention_summary().transformers["transformer"]
        pipe.disable_sparse_attention()
        dense = models.generate(pipe, **size)
        enable_parallelism(pipe.transformer, job["config"])
        pipe.enable_sparse_attention(plan, backend="cpu")
        together = [models.generate(pipe, **size) for _ in range(2)]
        after = pipe.sparse_attention_summary().transformers["transformer"]
    return {
        "same": [bool(torch.equal(alone, out)) for out in together],
        "apart": max(float((out - alone).abs().max()) for out in together),
        "largest": float(alone.abs().max()),
        "sparse": float((alone - dense).abs().max()),
        "reused": [before.reused_heads, after.reused_heads],
        "calls": after.sparse_calls,
        "reasons": after.dense_reasons,
    }


def run_page(job: dict[str, Any]) -> dict[str, Any]:
    """The Python of a page, for which the CPU is a GPU, gloo is NCCL and a tiny random pipeline is the model."""
    from diffusers import WanPipeline

    made = models.wan_pipeline()
    made.transformer = again(made.transformer, job["heads"])
    size = {"height": 128, "width": 144}
    with tempfile.TemporaryDirectory() as folder:
        models.mixed_plan(made.transformer).save_pretrained(Path(folder) / "my_plan")
        made.enable_sparse_attention(Path(folder) / "my_plan", backend="cpu")
        alone = models.generate(made, **size)
        made.disable_sparse_attention()
        os.chdir(folder)
        namespace: dict[str, Any] = {"__name__": "__main__"}
        with (
            mock.patch.object(dist, "init_process_group"),
            mock.patch.object(torch.cuda, "set_device"),
            mock.patch.object(torch.accelerator, "device_count", lambda: 1),
            mock.patch.object(WanPipeline, "from_pretrained", lambda *args, **kwargs: made),
            mock.patch.object(WanPipeline, "to", lambda pipe, device: pipe),
        ):
            for block in job["blocks"]:
                exec(compile(block, "page", "exec", dont_inherit=True), namespace)
            out = models.generate(namespace["pipe"], **size)
        os.chdir("/")
    summary = made.sparse_attention_summary()
    ran = summary.transformers["transformer"]
    return {
        "same": bool(torch.equal(out, alone)),
        "calls": ran.sparse_calls,
        "shared": ran.shared,
        "text": str(summary),
    }


def main() -> None:
    rank, ranks, store, job = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    with mock.patch.object(dist, "all_gather", gather_uneven):
        whole = {"pipeline": run_pipeline, "page": run_page}
        found = {name: whole[name](job) if name in whole else run(name, job) for name in job["cases"]}
    print("RESULT" + json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
