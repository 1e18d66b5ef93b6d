"""Rows in compiled code, for every instruction set: head dims, block sizes and types, and the same bits each time."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections import deque

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention, sparse_attention
from diffsparse.kernels.backends.cpu import compiled as cpu_compiled
from diffsparse.kernels.backends.cpu.instructions import find_kernel
from diffsparse.kernels.backends.cpu.workers import on_workers
from tests.kernels.cases import MIXED, assert_like_torch, inputs, kernel_isas, random_layout, use_kernel
from tests.tolerance import ATTENTION, Work, assert_near

GRID = TokenGrid(2, 9, 13, text_before=5, text_after=40)


@pytest.fixture(params=kernel_isas() or ["none"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this processor has, asked for."""
    use_kernel(monkeypatch, request.param)
    return str(request.param)


@pytest.fixture
def threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dim", [16, 40, 72, 88, 96, 128, 256])
@pytest.mark.usefixtures("isa")
def test_head_dims(dim: int, block_size: int) -> None:
    layout = random_layout(GRID, MIXED, block_size, 0.3)
    q, k, v = inputs(GRID, len(MIXED), dim)
    mask = torch.ones(1, GRID.seq_len, dtype=torch.bool)
    mask[:, -30:] = False
    for kv_len in (None, mask):
        out, lse = sparse_attention(q, k, v, layout, kv_len=kv_len, backend="cpu", return_lse=True)
        want, want_lse = reference_attention(q, k, v, layout, kv_len=kv_len)
        assert_near(out.double(), want, ATTENTION)
        assert_near(lse.double(), want_lse, ATTENTION)


@pytest.mark.usefixtures("isa")
def test_compiled_code_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(cpu_compiled, "_run", lambda part, threads: ran.append(len(part)))
    sparse_attention(*inputs(GRID, len(MIXED), 64), random_layout(GRID, MIXED, 64, 0.3), backend="cpu")
    assert ran == [len(MIXED) - 1]  # all but the head that is skipped


@pytest.mark.usefixtures("isa")
def test_same_bits_on_any_number_of_threads(threads) -> None:  # type: ignore[no-untyped-def]
    layout = random_layout(GRID, MIXED, 64, 0.3)
    q, k, v = inputs(GRID, len(MIXED), 64, batch=2)
    results = []
    for number in (1, 2, 3, 2):
        threads(number)
        results.append(sparse_attention(q, k, v, layout, backend="cpu", return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.usefixtures("isa")
def test_few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = random_layout(GRID, MIXED, 64, 0.3)
    q, k, v = inputs(GRID, len(MIXED), 64, batch=2)
    want = sparse_attention(q, k, v, layout, backend="cpu")
    monkeypatch.setattr(cpu_compiled, "_MAX_TABLE_BYTES", 1)
    assert torch.equal(sparse_attention(q, k, v, layout, backend="cpu"), want)


@pytest.mark.usefixtures("isa")
def test_nan_in_one_query_stays_there() -> None:
    layout = random_layout(GRID, MIXED[:1], 64, 1.0, diagonal=True)
    q, k, v = inputs(GRID, 1, 64)
    q[0, 7] = torch.nan
    out, _ = sparse_attention(q, k, v, layout, backend="cpu", return_lse=True)
    assert bool(out[0, 7].isnan().all()) and int(out.isnan().any(-1).sum()) == 1


#: A logit of a head of 64 channels.
LOGIT = Work(length=64)


@pytest.mark.usefixtures("isa")
def test_logits_that_no_exponential_holds() -> None:
    layout = random_layout(GRID, MIXED[:1], 64, 0.5, diagonal=True)
    q, k, v = inputs(GRID, 1, 64)
    out, lse = sparse_attention(q * 300, k, v, layout, backend="cpu", return_lse=True)
    want, want_lse = reference_attention(q * 300, k, v, layout)
    assert_near(lse.double(), want_lse, LOGIT)
    # Logits of some thousands are off by that much, and weights by as large a share: by half of it at most in a mean.
    share = LOGIT.tolerance(lse, want_lse) / 2
    torch.testing.assert_close(out.double(), want, rtol=0, atol=share * float(v.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "block_size"), [(16, 128), (40, 64), (128, 64)])
@pytest.mark.usefixtures("isa")
def test_16_bits(dim: int, block_size: int, dtype: torch.dtype) -> None:
    layout = random_layout(GRID, MIXED, block_size, 0.3, diagonal=True)
    q, k, v = inputs(GRID, len(MIXED), dim, dtype=dtype)
    mask = torch.ones(1, GRID.seq_len, dtype=torch.bool)
    mask[:, -30:] = False
    out, lse = sparse_attention(q, k, v, layout, backend="cpu", return_lse=True)
    assert_like_torch(out, lse, q, k, v, layout)
    masked = sparse_attention(q, k, v, layout, kv_len=mask, backend="cpu")
    assert_near(masked.double(), reference_attention(q, k, v, layout, kv_len=mask)[0], Work(length=1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inputs_of_16_bits_are_not_converted_as_a_whole(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs(GRID, len(MIXED), 64, dtype=dtype)
    seen = []
    monkeypatch.setattr(cpu_compiled, "_run", lambda part, threads: seen.extend(part))
    monkeypatch.setattr(cpu_compiled, "_spare", deque())
    sparse_attention(q, k, v, random_layout(GRID, MIXED, 64, 0.3), backend="cpu")
    assert seen
    for one in seen:
        tensors = dict(zip(cpu_compiled._POINTERS, one.tensors))
        assert {tensors[name].dtype for name in ("keys", "values", "query", "out")} == {dtype}
        assert q.data_ptr() <= tensors["query"].data_ptr() < q.data_ptr() + q.nbytes
        assert {dtype for _, dtype in one.space._buffers} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_widened_and_narrowed(isa: str, dtype: torch.dtype) -> None:
    library, kind = find_kernel().library, ctypes.c_int64(cpu_compiled._TYPES.index(dtype))
    assert library is not None
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    wide = torch.empty(len(every))
    count = ctypes.c_int64(len(every))
    library.diffsparse_widen(ctypes.c_void_p(wide.data_ptr()), ctypes.c_void_p(every.data_ptr()), count, kind)
    assert torch.equal(wide.nan_to_num(0.5), every.float().nan_to_num(0.5))
    assert torch.equal(wide.isnan(), every.isnan()) and torch.equal(wide.signbit(), every.signbit())
    # Each number itself, ties between it and the next one, what is just beyond them, and what has no such number.
    order = every[every.isfinite()].float().sort().values
    ties = order[:-1] + order.diff() / 2
    other = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, -65536.0, 1e30, -3.4e38, 1e-30, 2.0**-25])
    edges = [order, *(ties.nextafter(torch.full_like(ties, x)) for x in (-torch.inf, torch.inf)), ties, other]
    given = torch.cat(edges)
    narrow = torch.empty(len(given), dtype=dtype)
    count = ctypes.c_int64(len(given))
    library.diffsparse_narrow(ctypes.c_void_p(narrow.data_ptr()), ctypes.c_void_p(given.data_ptr()), count, kind)
    want = given.to(dtype)
    assert torch.equal(narrow.nan_to_num(0.5), want.nan_to_num(0.5)) and torch.equal(narrow.isnan(), want.isnan())
    signed = ~want.isnan()
    assert torch.equal(narrow.signbit()[signed], want.signbit()[signed])


@pytest.mark.usefixtures("isa")
def test_only_queries_that_are_there_are_written() -> None:
    """Short blocks share their row with nobody, and rows without keys are 0, in memory that held something else."""
    grid = TokenGrid(1, 7, 11, text_after=3)
    layout = random_layout(grid, [MIXED[0]], 64, 0.0)
    q, k, v = inputs(grid, 1, 16, batch=2)
    out, lse = sparse_attention(q, k, v, layout, backend="cpu", return_lse=True)
    want, want_lse = reference_attention(q, k, v, layout)
    assert_near(out.double(), want, ATTENTION)
    assert_near(lse.double(), want_lse, ATTENTION)


def test_workers_leave_threads_as_they_are(threads) -> None:  # type: ignore[no-untyped-def]
    threads(2)
    assert on_workers(2, lambda _: torch.get_num_threads(), range(4)) == [1] * 4
    assert torch.get_num_threads() == 2
    assert not torch.is_inference_mode_enabled()


def test_workers_raise_what_was_raised() -> None:
    done = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError("item 1")
        done.append(item)

    with pytest.raises(ValueError, match="item 1"):
        on_workers(2, work, range(6))
    assert sorted(done) == [0, 2, 3, 4, 5]


def _in_child(queue) -> None:  # type: ignore[no-untyped-def]
    queue.put(on_workers(2, lambda item: item + 1, [1, 2, 3]))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_workers_after_a_fork() -> None:
    on_workers(2, lambda item: item, [1])
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue,), daemon=True)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert queue.get() == [2, 3, 4]
