"""Run in a process of its own with TRITON_INTERPRET=1: the Hopper kernel, emulated, against the oracle."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import pairwise, product

import torch

from diffsparse.entry import NUMERICS as NAMES
from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.heads import TAIL
from diffsparse.kernels import reference_attention
from diffsparse.kernels.backends.gluon_sm90 import quantize
from diffsparse.kernels.call import AttentionCall, make_call
from diffsparse.order import AxisOrder, TileOrder
from tests.kernels import gluon_emulator
from tests.kernels.apart import case, finish
from tests.kernels.cases import MIXED, head, inputs, one_key_layout, random_layout, with_wide_queries

#: So many blocks of 64 that their summaries fill two slots, and those of halves three.
_MANY_BLOCKS = TokenGrid(17, 16, 16)
#: (grid, entries, block size, head_dim, dtype, valid text or None)
FAST = [
    (TokenGrid(2, 9, 15, text_before=5, text_after=20), [head(), head(TileOrder(1, 8, 8), "moments")], 64, 64,
     torch.bfloat16, 7),
    (TokenGrid(2, 16, 16), [head(tail="mean"), head(tail="centroids"), head(mode="skip")], 128, 128,
     torch.float16, None),
    (TokenGrid(2, 11, 13, text_after=140), [head(), head(TileOrder(1, 8, 8)), head(mode="skip")], 128, 96,
     torch.bfloat16, 3),
    (_MANY_BLOCKS, [head(tail="moments"), head(tail="centroids")], 64, 64, torch.bfloat16, None),
]  # fmt: skip
SLOW = [
    (TokenGrid(3, 11, 13, text_after=140), list(MIXED), 128, 96, torch.bfloat16, 3),
    (TokenGrid(4, 9, 16), list(MIXED), 64, 64, torch.float16, None),
    (TokenGrid(2, 16, 17, text_before=130), [head(AxisOrder("WHF"), "mean"), head()], 128, 72, torch.bfloat16, None),
    (TokenGrid(8, 16, 16), [head(), head(tail="moments")], 128, 128, torch.bfloat16, None),
    (TokenGrid(2, 9, 15, text_before=5, text_after=20), [head(), head(AxisOrder("WHF"))], 64, 64, torch.float16, 7),
]  # fmt: skip


#: In 8 bits: (grid, entries, block size, head_dim, valid text or None)
_NO_TAILS = [head(), head(TileOrder(1, 8, 8)), head(mode="skip")]
_TAILS = [head(tail="mean"), head(TileOrder(1, 8, 8), "centroids"), head(), head(tail="moments")]
_OF_HEADS = [head(numerics="int8"), head(TileOrder(1, 8, 8), "mean", numerics="fp8"), head(), head(TileOrder(1, 8, 8))]
EIGHT = [
    (TokenGrid(2, 9, 15, text_before=5, text_after=20), _NO_TAILS, 64, 64, 7),
    (TokenGrid(3, 11, 13, text_after=140), _NO_TAILS, 128, 128, 3),
    (TokenGrid(4, 16, 16), _NO_TAILS, 128, 64, None),
    (TokenGrid(3, 11, 13, text_before=5, text_after=20), _TAILS, 64, 64, 7),
    (TokenGrid(4, 16, 17), _TAILS, 128, 128, None),
    (TokenGrid(3, 11, 13, text_before=5, text_after=20), _OF_HEADS, 64, 64, 7),
]


# Faults of the kind that only a GPU would show, and only now and then: (numerics, tail, what, text, with the fault).
_LINE = "\n" + " " * 4
_TAKE = "products = warpgroup_mma_wait(0, deps=(products,))" + _LINE
_FREE = ("k_empty.index(k_stage)", "v_empty.index(v_stage)", "empty.index(done)")
_FREE_KEYS, _FREE_VALUES, _FREE_EIGHT = (f"mbarrier.arrive({slot}, count=1)" for slot in _FREE)
_TOGETHER = "if SHARED:" + _LINE + "    "
_APART = _TOGETHER + _FREE_KEYS + _LINE + "else:" + _LINE + "    "
_TAKE_8 = "products, added = warpgroup_mma_wait(0, deps=(products, added))" + _LINE
_PACK_8 = "# Not before the wait: it would hold the products up, whose operand these registers are." + _LINE
_PACK_8 += "p = _packed(bits)" + _LINE
_NEXT_8 = "mbarrier.wait(full.index(stage), phase)" + _LINE + _TAKE_8
_KEYS = "mbarrier.wait(k_full.index(k_stage), k_phase)" + _LINE
_VALUES = "mbarrier.wait(v_full.index(v_stage), v_phase)" + _LINE + "    values"
_SUMS = "logits = warpgroup_mma_wait(0, deps=(logits,))\n" + " " * 8
_FREE_MEANS = "mbarrier.arrive(k_empty.index(means), count=1)"
_VARIANCES = "\n" + " " * 12 + "var = k_ring"
_LOST = "  mark(work, t, total_tiles)"
_COUNT = "mbarrier.init(k_empty.index(s), count=CONSUMERS)"
_GIVE_UP = "mbarrier.invalidate(second_turn)"
FAULTS = (
    ("auto", "none", "blocks are read early", _KEYS + "if TAKE_TURNS", "if TAKE_TURNS"),
    ("auto", "none", "blocks are given back early", _TAKE + _TOGETHER + _FREE_KEYS,
     _FREE_KEYS + _LINE + _TAKE + _TOGETHER + "pass"),
    ("auto", "none", "a turn is never passed on", "mbarrier.arrive(turn[1 - WHICH], count=1)", "pass"),
    ("auto", "none", "one consumer frees a slot for both", _COUNT, _COUNT.replace("CONSUMERS", "1")),
    ("auto", "none", "a barrier is never given up", _GIVE_UP, "pass"),
    ("auto", "mean", "keys are read early", _KEYS + "if TAKE_TURNS", "if TAKE_TURNS"),
    ("auto", "mean", "values are read early", _VALUES, "values"),
    ("auto", "mean", "values are given back early", _TAKE + _APART + _FREE_VALUES,
     _FREE_VALUES + _LINE + _TAKE + _APART + "pass"),
    ("auto", "moments", "means are given back early", _SUMS + _FREE_MEANS, _FREE_MEANS + "\n" + " " * 8 + _SUMS),
    ("auto", "moments", "variances are read early", _KEYS.strip() + _VARIANCES, _VARIANCES.strip()),
    ("auto", "wide", "what went out of range is left so", _LOST, "  pass"),
    ("int8", "none", "blocks in 8 bits are read early", _NEXT_8, _TAKE_8),
    ("int8", "none", "blocks in 8 bits are given back early", _TAKE_8 + _PACK_8 + _FREE_EIGHT,
     _FREE_EIGHT + _LINE + _TAKE_8 + _PACK_8 + "pass"),
)  # fmt: skip


def quantized(
    call: AttentionCall, numerics: str, means: tuple[torch.Tensor, torch.Tensor] | None = None
) -> quantize.Quantized:
    """As ``quantize.quantize``, block by block in plain torch (Triton's interpreter rounds to fp8 wrongly).

    Of heads that run in other numerics nothing is made.
    """
    k_mean, v_mean = (x.float().mean(1) for x in (call.k, call.v))
    v_scale = (call.v.float() - v_mean[:, None]).abs().amax(1) / 448.0
    block, dim = call.block_size, call.q.shape[3]
    turn = quantize.rotation(dim, torch.float32, call.q.device)
    whole = dict(k_mean=k_mean, v_mean=v_mean, v_scale=v_scale, turned_mean=k_mean @ turn)
    out = replace(quantize.empty_quantized(call, numerics), **whole)
    largest = 448.0 if numerics == "fp8" else 127.0
    q8, k8, v8 = (x.transpose(1, 2) for x in (out.q, out.k, out.v))

    def put(x: torch.Tensor, x8: torch.Tensor, scale: torch.Tensor, b: int, h: int, i: int) -> None:
        padded = torch.zeros(block, dim)
        padded[: len(x)] = x @ turn / dim**0.5
        scale[b, h, i] = padded.abs().max().clamp_min(1e-12) / largest
        padded /= scale[b, h, i]
        x8[b, h, i * block : (i + 1) * block] = (padded if numerics == "fp8" else padded.round()).to(x8.dtype)

    def put_keys(k: torch.Tensor, v: torch.Tensor, b: int, h: int, i: int) -> None:
        put(k.float() - k_mean[b, h], k8, out.k_scale, b, h, i)
        padded = torch.zeros(block, dim)
        padded[: len(v)] = (v.float() - v_mean[b, h]) / v_scale[b, h]
        v8[b, h, i * dim : (i + 1) * dim] = padded[quantize.value_order(block)].T.to(v8.dtype)

    kinds, n = call.head_kinds().tolist(), call.num_blocks
    for b, h in product(range(call.q.shape[0]), range(call.q.shape[2])):
        if kinds[h] != NAMES.index(numerics):
            continue
        order = int(call.tokens.head_order[h])
        for i, (start, end) in enumerate(pairwise(call.tokens.block_start[order].tolist())):
            token = call.tokens.gather[order, start:end].long()
            put(call.q[b, token, h].float(), q8, out.q_scale, b, h, i)
            put_keys(call.k[b, token, h], call.v[b, token, h], b, h, i)
        tail = TAILS[int(call.heads.table[h, TAIL])]
        if tail == "none" or means is None:
            continue
        rows = [x[b, h].reshape(2 * n, dim)[: 2 * n if tail == "centroids" else n] for x in means]
        for i, (k, v) in enumerate(zip(*(x.split(block) for x in rows))):
            put_keys(k, v, b, h, n + i)
    return out


def dequantized(call: AttentionCall, numerics: str) -> list[torch.Tensor]:
    """q, k and v as they are once they have been rounded to 8 bits, keys without their mean: what the kernel gets."""
    small = quantized(call, numerics)
    block, dim = call.block_size, call.q.shape[3]
    turn = quantize.rotation(dim, torch.float32, call.q.device) / dim**0.5
    back = quantize.value_order(block).argsort()
    found = [x.float().clone() for x in (call.q, call.k, call.v)]
    for b, h in product(range(call.q.shape[0]), range(call.q.shape[2])):
        order = int(call.tokens.head_order[h])
        for i, (start, end) in enumerate(pairwise(call.tokens.block_start[order].tolist())):
            token, rows = call.tokens.gather[order, start:end].long(), slice(i * block, i * block + end - start)
            found[0][b, token, h] = small.q[b, rows, h].float() * small.q_scale[b, h, i] @ turn.T
            found[1][b, token, h] = small.k[b, rows, h].float() * small.k_scale[b, h, i] @ turn.T
            v = small.v[b, i * dim : (i + 1) * dim, h].float().T[back][: end - start]
            found[2][b, token, h] = v * small.v_scale[b, h] + small.v_mean[b, h]
    return found


def check_range() -> None:
    """Tiles whose exponentials, taken as they are, go out of range, among others in which they do not; and a head all
    of whose do."""
    grid = TokenGrid(4, 11, 13, text_after=140)
    entries = [head(), head(TileOrder(1, 8, 8)), head(tail="mean")]
    for block, valid in ((128, None), (64, grid.seq_len - 100)):
        torch.manual_seed(0)
        layout = random_layout(grid, entries, block, 0.4)
        q, k, v = inputs(grid, len(entries), 64, batch=2, dtype=torch.bfloat16)
        q = with_wide_queries(q)
        q[1, :, 0] *= 100
        kv_len = None if valid is None else torch.tensor([valid, grid.seq_len])
        call = make_call(q, k, v, layout, kv_len=kv_len, return_lse=True)
        want, want_lse = reference_attention(q, k, v, layout, kv_len=kv_len)
        assert float(want_lse.abs().max()) > 200
        kernel = gluon_emulator.load_emulated(multiprocessors=3)
        for least in (0, 1 << 62):
            kernel.TWO_PASSES = least
            with case("out of range", block, "one pass" if least else "two passes") as told:
                out, lse = kernel.run(call)
                error = float((out.double() - want)[:, :, :2].norm() / want[:, :, :2].norm())
                assert error < 6e-3, error
                torch.testing.assert_close(lse.double()[:, :, :2], want_lse[:, :, :2], atol=1e-2, rtol=1e-3)
                # Wide queries take the rounding of summaries with them.
                assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
                told.append(f"{error:.1e}")
    with case("one key"):
        # Where one key is all there is, its value comes out, however probabilities are rounded.
        layout = one_key_layout(grid, len(entries), 128)
        call = make_call(q, k, v, layout, kv_len=torch.tensor([grid.num_visual + 1] * 2), return_lse=True)
        out, lse = gluon_emulator.load_emulated(multiprocessors=3).run(call)
        out, lse = out[:, : grid.num_visual], lse[:, : grid.num_visual]
        assert torch.equal(out, v[:, grid.num_visual, None].expand_as(out))
        want = (
            torch.einsum("bshd,bhd->bsh", q[:, : grid.num_visual].double(), k[:, grid.num_visual].double()) * call.scale
        )
        torch.testing.assert_close(lse.double(), want, atol=1e-4, rtol=1e-5)


def check_eight_bits() -> None:
    kernel = gluon_emulator.load_emulated(multiprocessors=3)
    kernel.quantize = quantized
    for grid, entries, block, dim, text in EIGHT:
        torch.manual_seed(0)
        layout = random_layout(grid, entries, block, 0.5)
        q, k, v = inputs(grid, len(entries), dim, batch=2, dtype=torch.bfloat16)
        # Channels with a mean and tokens that stand out, as models have them.
        k, v = k + 3 * torch.randn(dim).to(k), v + 1
        k[:, ::37] *= 3
        kv_len = None if text is None else torch.tensor([grid.seq_len - grid.text_after + text, grid.seq_len])
        want, want_lse = reference_attention(q, k, v, layout, kv_len=kv_len)
        for numerics in ("auto",) if layout.heads.numerics != ("auto",) else ("int8", "fp8"):
            with case(numerics, grid, block, dim) as told:
                call = make_call(q, k, v, layout, kv_len=kv_len, return_lse=True, numerics=numerics)
                out, lse = kernel.run(call)
                assert torch.equal(lse.isneginf(), want_lse.isneginf())
                for h, kind in enumerate(NAMES[i] for i in call.head_kinds().tolist()):
                    # fp8 has 3 bits of the logits of tokens that stand out.
                    most, most_lse = {"auto": (6e-3, 5e-2), "int8": (2e-2, 0.5), "fp8": (4.5e-2, 2.0)}[kind]
                    difference = (out[:, :, h].double() - want[:, :, h]).norm()
                    assert float(difference) <= most * float(want[:, :, h].norm()), (h, kind, difference)
                    torch.testing.assert_close(lse[:, :, h].double(), want_lse[:, :, h], atol=most_lse, rtol=1e-3)
                if numerics != "auto" and not layout.heads.has_tail:
                    # What the kernel adds to the rounding of its inputs: probabilities in fp8, which has 4 bits.
                    exact, exact_lse = reference_attention(*dequantized(call, numerics), layout, kv_len=kv_len)
                    assert float((out.double() - exact).norm() / exact.norm()) < 1.5e-2
                    shift = torch.einsum("bshd,bhd->bsh", q.double(), k.double().mean(1)) * call.scale
                    torch.testing.assert_close(lse.double(), exact_lse + shift, atol=1e-3, rtol=1e-5)
                error = float((out.double() - want).norm() / want.norm())
                told.append(f"{error:.1e}")


def check_quantize_kernel() -> None:
    """The kernel that makes them: integers as in plain torch; values that fp8 has exactly stay."""
    grid, entries = TokenGrid(2, 9, 15, text_before=70, text_after=20), [head(), head(TileOrder(1, 8, 8))]
    layout = random_layout(grid, entries, 64, 0.4)
    q, k, v = inputs(grid, len(entries), 64, batch=2)
    # Mean 0, largest 448 (so that the scale is 1), and whole numbers up to 8 between.
    v = torch.randint(0, 9, v.shape).float()
    v[:, 0], v[:, 1:] = 448.0, v[:, 1:] * torch.where(torch.arange(1, grid.seq_len) % 2 == 1, 1.0, 0.0)[:, None, None]
    v[:, 2::2] = -v[:, 1:-1:2]
    v[:, -1] = -448.0 - v[:, 1:-1].sum(1)
    call = make_call(q, k, v, layout, numerics="int8")
    got, want = quantize.quantize(call, "int8"), quantized(call, "int8")
    for name in ("q_scale", "k_scale", "v_scale", "k_mean", "v_mean", "turned_mean"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), msg=name)
    for name in ("q", "k"):
        # Halves may be rounded either way.
        assert int((getattr(got, name).int() - getattr(want, name).int()).abs().max()) <= 1
        assert float((getattr(got, name) != getattr(want, name)).float().mean()) < 1e-3
    torch.testing.assert_close(got.v.float(), want.v.float())


def check_faults() -> None:
    """The emulation is worth something: it notices each fault."""
    grid = TokenGrid(4, 16, 16)
    qkv = inputs(grid, 2, 128, dtype=torch.bfloat16)

    def runs_right(numerics: str, tail: str, edit: tuple[str, str] | None) -> bool:
        entry = head(tail="none" if tail == "wide" else tail)
        layout = random_layout(grid, [entry, entry], 128, 0.6)
        q, k, v = qkv
        if tail == "wide":
            q = with_wide_queries(q)
        if tail == "moments":  # summaries that fill more than one slot
            layout = random_layout(_MANY_BLOCKS, [head(tail=tail)], 64, 0.02)
            q, k, v = inputs(_MANY_BLOCKS, 1, 64, dtype=torch.bfloat16)
        want, _ = reference_attention(q, k, v, layout)
        kernel = gluon_emulator.load_emulated(1, edit)
        kernel.quantize = quantized
        call = make_call(q, k, v, layout, numerics=numerics)
        most = 0.01 if numerics == "auto" else 0.06
        # A fault may be a signal that never comes, which need not be waited for long. What is right has the time that
        # a busy machine takes.
        gluon_emulator.DEADLOCK_SECONDS = 20.0 if edit is None else 2.0
        try:
            # A fault shows only now and then.
            return all(
                float((kernel.run(call)[0].double() - want).norm() / want.norm()) < most
                for _ in range(5 if edit is None else 20)
            )
        except AssertionError:  # what the emulation itself notices
            return False

    for form in sorted({fault[:2] for fault in FAULTS}):
        assert runs_right(*form, None), form
    for numerics, tail, what, text, fault in FAULTS:
        with case("noticed:", what):
            assert not runs_right(numerics, tail, (text, fault)), "the output is right"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--eight", action="store_true")
    if parser.parse_args().faults:
        return check_faults()
    if parser.parse_args().eight:
        with case("quantize"):
            check_quantize_kernel()
        return check_eight_bits()
    slow = parser.parse_args().slow
    if not slow:
        check_range()
    kernel = gluon_emulator.load_emulated(multiprocessors=3)
    for grid, entries, block, dim, dtype, text in SLOW if slow else FAST:
        torch.manual_seed(0)
        for density in (0.0, 0.02 if grid is _MANY_BLOCKS else 0.4):
            with case(grid, block, dim, density) as told:
                # With lists: two heads at a time.
                kernel.COPY_BYTES = 1 << 30 if not density else 2 * 3 * 2 * grid.seq_len * dim * dtype.itemsize
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
                told.append(f"{error:.1e}")


if __name__ == "__main__":
    main()
    finish()
