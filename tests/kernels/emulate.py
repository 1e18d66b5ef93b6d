"""Run in a process of its own with TRITON_INTERPRET=1: the Hopper kernel, emulated, against the oracle."""

from __future__ import annotations

import argparse

import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention
from diffsparse.kernels.call import make_call
from diffsparse.order import AxisOrder, TileOrder
from tests.kernels import gluon_emulator
from tests.kernels.cases import MIXED, head, inputs, random_layout

#: (grid, entries, block size, head_dim, dtype, valid text or None)
FAST = [
    (TokenGrid(2, 9, 15, text_before=5, text_after=20), [head(), head(TileOrder(1, 8, 8), "moments")], 64, 64,
     torch.bfloat16, 7),
    (TokenGrid(2, 16, 16), [head(tail="mean"), head(tail="centroids"), head(mode="skip")], 128, 128,
     torch.float16, None),
]  # fmt: skip
SLOW = [
    (TokenGrid(3, 11, 13, text_after=140), list(MIXED), 128, 96, torch.bfloat16, 3),
    (TokenGrid(4, 9, 16), list(MIXED), 64, 64, torch.float16, None),
    (TokenGrid(2, 16, 17, text_before=130), [head(AxisOrder("WHF"), "mean"), head()], 128, 72, torch.bfloat16, None),
    (TokenGrid(8, 16, 16), [head(), head(tail="moments")], 128, 128, torch.bfloat16, None),
]  # fmt: skip


# Faults of the kind that only a GPU would show, and only now and then: (what, text, text with the fault).
_TAKE = "acc, p = warpgroup_mma_wait(0, deps=(acc, next_p))"
_FREE = "mbarrier.arrive(v_empty.index(v_stage), count=1)"
_LINE = "\n" + " " * 24
FAULTS = (
    ("keys are read early", "mbarrier.wait(k_full.index(k_stage), k_phase, pred=e + 1 < listed)", "pass"),
    ("values are given back early", _TAKE + _LINE + _FREE, _FREE + _LINE + _TAKE),
    ("a turn is never passed on", "mbarrier.arrive(turn.index(1 - WHICH), count=1)", "pass"),
    ("one consumer frees a slot for both", "mbarrier.init(k_empty.index(s), count=CONSUMERS)",
     "mbarrier.init(k_empty.index(s), count=1)"),
)  # fmt: skip


def check_faults() -> None:
    """The emulation is worth something: it notices each fault."""
    gluon_emulator.DEADLOCK_SECONDS = 2.0
    grid, entries = TokenGrid(4, 16, 16), [head(), head()]
    layout = random_layout(grid, entries, 128, 0.6)
    call = make_call(*inputs(grid, len(entries), 128, dtype=torch.bfloat16), layout)
    want, _ = reference_attention(call.q, call.k, call.v, layout)
    for what, text, fault in FAULTS:
        kernel = gluon_emulator.load_emulated(1, (text, fault))
        try:
            for _ in range(5):
                torch.testing.assert_close(kernel.run(call)[0].double(), want, atol=3e-2, rtol=3e-2)
        except AssertionError:
            print("noticed:", what, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--faults", action="store_true")
    if parser.parse_args().faults:
        return check_faults()
    kernel = gluon_emulator.load_emulated(multiprocessors=3)
    for grid, entries, block, dim, dtype, text in SLOW if parser.parse_args().slow else FAST:
        torch.manual_seed(0)
        for density in (0.0, 0.4):
            layout = random_layout(grid, entries, block, density)
            q, k, v = inputs(grid, len(entries), dim, batch=2, dtype=dtype)
            valid = None if text is None else grid.seq_len - grid.text_after + text
            kv_len = None if valid is None else torch.tensor([valid, grid.seq_len])
            call = make_call(q, k, v, layout, kv_len=kv_len, return_lse=True)
            out, lse = kernel.run(call)
            want, want_lse = reference_attention(q, k, v, layout, kv_len=kv_len)
            # Probabilities and summaries are rounded to 8 bits (bfloat16).
            torch.testing.assert_close(out.double(), want, atol=3e-2, rtol=3e-2)
            torch.testing.assert_close(lse.double(), want_lse, atol=1e-2, rtol=1e-3)
            error = float((out.double() - want).norm() / want.norm())
            assert error < 6e-3, error
            print("ok", grid, block, dim, density, f"{error:.1e}", flush=True)


if __name__ == "__main__":
    main()
