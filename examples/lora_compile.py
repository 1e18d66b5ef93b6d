"""A plan, a LoRA and ``torch.compile`` of the repeated blocks, all on one Wan pipeline.

    python examples/lora_compile.py --tiny                        # random weights, a random LoRA
    python examples/lora_compile.py --lora my_lora.safetensors --plan plan

The first clip waits for the compiler, the second one does not. On a CPU the compiler needs a C++ compiler.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from diffusers import WanPipeline
from wan import random_pipeline  # beside this file

from diffsparse import PlanError
from diffsparse.search.errors import BadInput
from diffsparse.search.load import check_model_name, choose_device, choose_dtype


def run(
    model: Annotated[str, typer.Option(help="A Wan pipeline's folder or Hub id.")] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    lora: Annotated[str | None, typer.Option(help="A LoRA's file, folder or Hub id; none: a random one.")] = None,
    plan: Annotated[str, typer.Option(help="A plan's folder or Hub id, or auto, window, radial, ...")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="Random weights instead of a model.")] = False,
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red circle over yellow stripes, panning left",
    height: Annotated[int, typer.Option(help="In pixels.")] = 480,
    width: Annotated[int, typer.Option(help="In pixels.")] = 832,
    num_frames: Annotated[int, typer.Option(help="Frames of the clip.")] = 81,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    backend: Annotated[str, typer.Option(help="What compiles: inductor, or aot_eager to try it out.")] = "inductor",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Generate two clips and tell how long each took and what ran."""
    place = choose_device(device)
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise BadInput(f"--backend {backend!r}: torch has no such compiler; use inductor or aot_eager")
    if tiny:
        pipe, inputs = random_pipeline()
    else:
        check_model_name(model)
        pipe = WanPipeline.from_pretrained(model, dtype=choose_dtype("auto", place))
        inputs = {"prompt": prompt, "height": height, "width": width, "num_frames": num_frames}
        inputs["num_inference_steps"] = steps
    pipe.to(place)
    if lora is not None:
        pipe.load_lora_weights(lora)
    else:
        import peft

        config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(config)
    pipe.enable_sparse_attention(plan)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    for clip in ("first", "second"):
        start = time.perf_counter()
        pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="latent")
        print(f"{clip} clip: {time.perf_counter() - start:.1f} s")
    print(pipe.sparse_attention_summary())


def main() -> None:
    try:
        typer.run(run)
    except (BadInput, PlanError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
