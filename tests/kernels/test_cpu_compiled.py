"""Rows in compiled code: head dims and block sizes, the same bits each time, and what happens without a compiler."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention, sparse_attention
from diffsparse.kernels.backends.cpu import compiled as cpu_compiled
from diffsparse.kernels.backends.cpu import compiler
from diffsparse.kernels.backends.cpu.compiler import SWITCH, compiled_library, find_compiler
from diffsparse.kernels.backends.cpu.workers import on_workers
from tests.kernels.cases import MIXED, cannot_compile, inputs, random_layout
from tests.tolerance import ATTENTION, Work, assert_near

needs_compiler = pytest.mark.skipif(cannot_compile() is not None, reason=str(cannot_compile()))
GRID = TokenGrid(3, 13, 17, text_before=5, text_after=40)


@pytest.fixture
def threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dim", [16, 40, 72, 88, 96, 128, 256])
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


@needs_compiler
def test_compiled_code_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(cpu_compiled, "_run", lambda part, threads: ran.append(len(part)))
    sparse_attention(*inputs(GRID, len(MIXED), 64), random_layout(GRID, MIXED, 64, 0.3), backend="cpu")
    assert ran == [len(MIXED) - 1]  # all but the head that is skipped


@needs_compiler
def test_same_bits_on_any_number_of_threads(threads) -> None:  # type: ignore[no-untyped-def]
    layout = random_layout(GRID, MIXED, 64, 0.3)
    q, k, v = inputs(GRID, len(MIXED), 64, batch=2)
    results = []
    for number in (1, 2, 3, 2):
        threads(number)
        results.append(sparse_attention(q, k, v, layout, backend="cpu", return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@needs_compiler
def test_few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = random_layout(GRID, MIXED, 64, 0.3)
    q, k, v = inputs(GRID, len(MIXED), 64, batch=2)
    want = sparse_attention(q, k, v, layout, backend="cpu")
    monkeypatch.setattr(cpu_compiled, "_MAX_TABLE_BYTES", 1)
    assert torch.equal(sparse_attention(q, k, v, layout, backend="cpu"), want)


@needs_compiler
def test_nan_in_one_query_stays_there() -> None:
    layout = random_layout(GRID, MIXED[:1], 64, 1.0, diagonal=True)
    q, k, v = inputs(GRID, 1, 64)
    q[0, 7] = torch.nan
    out, _ = sparse_attention(q, k, v, layout, backend="cpu", return_lse=True)
    assert bool(out[0, 7].isnan().all()) and int(out.isnan().any(-1).sum()) == 1


#: A logit of a head of 64 channels.
LOGIT = Work(length=64)


@needs_compiler
def test_logits_that_no_exponential_holds() -> None:
    layout = random_layout(GRID, MIXED[:1], 64, 0.5, diagonal=True)
    q, k, v = inputs(GRID, 1, 64)
    out, lse = sparse_attention(q * 300, k, v, layout, backend="cpu", return_lse=True)
    want, want_lse = reference_attention(q * 300, k, v, layout)
    assert_near(lse.double(), want_lse, LOGIT)
    # Logits of some thousands are off by that much, and weights by as large a share: by half of it at most in a mean.
    share = LOGIT.tolerance(lse, want_lse) / 2
    torch.testing.assert_close(out.double(), want, rtol=0, atol=share * float(v.abs().max()))


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert find_compiler() is None
    assert compiled_library.__wrapped__(cpu_compiled._SOURCE) is None


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for the compiler")
@pytest.mark.parametrize(("says", "told"), [("no such register", "no such register$"), ("", "CalledProcessError")])
def test_a_compiler_that_fails_is_told_and_done_without(
    says: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "{says}" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(SWITCH, raising=False)
    with caplog.at_level(logging.WARNING, "diffsparse"):
        assert compiled_library.__wrapped__(cpu_compiled._SOURCE) is None
    (line,) = caplog.messages
    begin = f"the CPU backend runs uncompiled, {broken} failed: "
    assert line.startswith(begin) and re.search(f"^({told})", line.removeprefix(begin))


@needs_compiler
def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
    assert compiled_library.__wrapped__(cpu_compiled._SOURCE) is not None
    assert [path.suffix for path in (tmp_path / "compiled").iterdir()] == [".so"]
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert compiled_library.__wrapped__(cpu_compiled._SOURCE) is not None


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
