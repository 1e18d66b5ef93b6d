"""What a layer that reuses saves by leaving out q, k and v: one block of Wan2.1-1.3B's width, on random weights.

python benchmarks/reuse.py --threads 1

Every second step all heads of the block's self-attention use the outputs of the step before. Such steps run with q, k
and v computed, and without, in turns; the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# ruff: noqa: E402
# The clone in the place of this folder, in which kernels.py would stand in for Hugging Face's package `kernels`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch

from diffsparse import Execution, HeadEntry, Schedule, SparsityPlan, TileOrder, Window
from diffsparse.pipelines import enable_sparse_attention, whole
from diffsparse.pipelines.state import state_of

LEVELS = tuple(0.9 - 0.1 * i for i in range(8))


def build(heads: int) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    ffn = round(heads * 128 * 8960 / 1536)
    return WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=1).eval().requires_grad_(False)


class Timer:
    """Seconds of a module's forwards."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds: list[float] = []
        module.register_forward_pre_hook(lambda *_: self.seconds.append(-time.perf_counter()))
        module.register_forward_hook(lambda *_: self.seconds.append(self.seconds.pop() + time.perf_counter()))


def grid_of(text: str) -> tuple[int, int, int]:
    sides = tuple(int(x) for x in text.split("x"))
    if len(sides) != 3 or min(sides) < 1:
        raise ValueError
    return sides[0], sides[1], sides[2]


def count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=count, default=12, help="of 128 channels each; 12 are a width of 1536")
    parser.add_argument("--grid", type=grid_of, default=(5, 20, 24), help="latent tokens, as 5x20x24 (the default)")
    parser.add_argument("--rounds", type=count, default=3, help="generations of eight steps, each way")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    frames, height, width = args.grid
    model = build(args.heads)
    entry = HeadEntry(TileOrder(1, 8, 8), Window((2, 0.5, 0.5)), execution=Execution(tail="mean", reuse=0.15))
    enable_sparse_attention(model, SparsityPlan.uniform(entry, schedule=Schedule()))
    attention, block = Timer(model.blocks[0].attn1), Timer(model.blocks[0])
    latents = torch.randn(1, 16, frames, 2 * height, 2 * width)
    text = torch.randn(1, 512, 4096)
    found: dict[tuple[str, bool], list[float]] = {}
    outputs: dict[bool, list[torch.Tensor]] = {}
    for _ in range(args.rounds):
        for rule in (False, True):
            state = state_of(model)
            assert state is not None
            scheduler = SimpleNamespace(timesteps=torch.tensor(LEVELS) * 1000, config={"num_train_timesteps": 1000})
            pipe = SimpleNamespace(scheduler=scheduler)
            state._pipe = lambda pipe=pipe: pipe  # type: ignore[assignment,misc]
            outputs[rule] = []
            with torch.no_grad(), mock.patch.object(whole, "ONE_USE", whole.ONE_USE if rule else frozenset()):
                for step, level in enumerate(LEVELS):
                    timestep = torch.tensor([level * 1000])
                    out = model(latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)
                    outputs[rule].append(out[0])
                    if step % 2:
                        found.setdefault(("attention", rule), []).append(attention.seconds[-1])
                        found.setdefault(("block", rule), []).append(block.seconds[-1])
    assert all(torch.equal(x, y) for x, y in zip(outputs[False], outputs[True], strict=True))
    print(f"{frames * height * width} tokens, width {128 * args.heads}, {torch.get_num_threads()} threads")
    for name in ("attention", "block"):
        before, after = (1e3 * statistics.median(found[name, rule]) for rule in (False, True))
        print(f"{name}: {before:.1f} ms with q, k and v, {after:.1f} ms without: {before / after:.2f}x")


if __name__ == "__main__":
    main()
