"""Time the denoising loop dense and sparse, in turn, so that what else the machine does falls on both:

    python benchmarks/loop.py examples/tiny_wan examples/tiny_wan/sparse_plan \\
        --prompts examples/tiny_wan/prompts/heldout.txt --count 3

Size, steps and guidance are those that the plan was searched with. Prints one line a clip and the ratio of the sums.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffsparse.search import load, script
from diffsparse.search.generate import GenerationSettings, generate_clip
from diffsparse.search.recorded import recorded


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a diffusers pipeline: a local folder or a Hub id")
    parser.add_argument("plan", help="a plan's folder or Hub id")
    parser.add_argument("--prompts", type=Path, required=True, help="a text file with one prompt a line")
    parser.add_argument("--count", type=script.at_least_one, default=3, help="clips, one of each of the first prompts")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--device", type=script.device, default="auto")
    return parser.parse_args()


def main() -> None:
    """Read the command line, generate, print."""
    args = arguments()
    load.quiet_libraries()
    device = args.device
    plan = load.load_plan(args.plan)
    pipe = load.load_pipeline(args.model, device=device, dtype=load.choose_dtype("auto", device))
    load.check_plan_fits(plan, pipe)
    searched = recorded(plan.record)
    settings = GenerationSettings(num_inference_steps=searched.pop("steps", None), **searched).resolved(pipe)
    sums = [0.0, 0.0]
    for prompt in load.read_prompts(args.prompts)[: args.count]:
        dense = generate_clip(pipe, prompt, args.seed, settings).loop_seconds
        with pipe.sparse_attention(plan):
            sparse = generate_clip(pipe, prompt, args.seed, settings).loop_seconds
        sums[0], sums[1] = sums[0] + dense, sums[1] + sparse
        print(f"{dense:7.2f} s dense  {sparse:7.2f} s sparse  {dense / sparse:.2f}x  {prompt}", flush=True)
    print(f"{sums[0]:7.2f} s dense  {sums[1]:7.2f} s sparse  {sums[0] / sums[1]:.2f}x  all")


if __name__ == "__main__":
    script.exit_with(main)
