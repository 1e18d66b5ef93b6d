"""A plan file with every pattern of the first format: it reads, keeps the same blocks and gives the same outputs.

The folder was written by the first version of the format and is never written again. ``kept_blocks.safetensors`` has
what the plan kept then: of each head the mask over blocks, the order of its tokens and its density.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.patterns import Empty
from diffsparse.patterns.registry import RETIRED, pattern_kinds
from diffsparse.plan import SparsityPlan

FOLDER = Path(__file__).parent / "golden" / "v1_patterns"
GRID = TokenGrid(3, 9, 11, text_before=5, text_after=70)
LAYER = "blocks.0.attn"


@pytest.fixture(scope="module")
def plan():
    return SparsityPlan.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def layout(plan):
    return plan.layout(0, LAYER, plan.architecture.heads, GRID)


def test_every_kind_of_the_first_format_is_in_the_file():
    text = (FOLDER / "sparse_plan.json").read_text()
    for kind in [*pattern_kinds(), *RETIRED]:
        assert f'"kind": "{kind}"' in text, kind


@pytest.fixture(scope="module")
def carried(plan, layout):
    """Heads whose bitmap is of another grid. They ran its fallback then, and are carried over since."""
    entries = plan.layer_entries(0, LAYER, layout.num_heads)
    found = [h for h, e in enumerate(entries) if e.pattern.is_carried(GRID, e.order, plan.block_size)]
    assert len(found) == 1
    return found


def test_it_keeps_the_same_blocks_bit_for_bit(layout, carried):
    then = load_file(FOLDER / "kept_blocks.safetensors")
    for head in range(layout.num_heads):
        kept = np.packbits(layout.mask(head).numpy())
        assert np.array_equal(kept, then["kept"][head]) is (head not in carried), head
        assert np.array_equal(layout.tokens.gather[layout.tokens.head_order[head]].numpy(), then["gather"][head]), head
    same = [head for head in range(layout.num_heads) if head not in carried]
    assert np.allclose(np.array(layout.densities)[same], then["densities"][same], rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_gives_the_same_outputs(plan, layout, carried, backend):
    """Heads without a tail, against torch's attention under the masks that were kept then."""
    then = load_file(FOLDER / "kept_blocks.safetensors")
    heads, blocks = layout.num_heads, layout.num_blocks
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, GRID.seq_len, heads, plan.architecture.head_dim, generator=generator) for _ in range(3))
    out = sparse_attention(q, k, v, layout, backend=backend)
    entries = plan.layer_entries(0, LAYER, heads)
    for head, entry in enumerate(entries):
        if entry.execution.mode == "skip":
            assert not out[:, :, head].any()
        elif entry.execution.tail == "none":
            kept = np.packbits(layout.mask(head).numpy()) if head in carried else then["kept"][head]
            mask = np.unpackbits(kept, count=blocks * blocks).reshape(blocks, blocks).astype(bool)
            sizes = layout.tokens.block_start[layout.tokens.head_order[head]].diff().numpy()
            order = then["gather"][head]
            block = np.empty(GRID.seq_len, np.int64)
            block[order] = np.repeat(np.arange(blocks), sizes)
            allowed = torch.from_numpy(mask[block][:, block])
            wanted = torch.nn.functional.scaled_dot_product_attention(
                *(x[:, :, head].double() for x in (q, k, v)), attn_mask=allowed
            )
            error = (out[:, :, head] - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-5, (head, str(entry), float(error))


def test_patterns_that_were_taken_out_are_read_as_what_they_did(plan):
    """Text rows and columns are kept by every layout: the patterns of that name added nothing."""
    heads = plan.layer_entries(0, LAYER, plan.architecture.heads)
    assert heads[4].pattern == heads[5].pattern == Empty()
    assert str(heads[6].pattern) == "window(1x2x3) | empty | empty"
