"""Which instruction set the CPU kernel is compiled for, what is said where it is not compiled, and what is kept."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import backend_ways, sparse_attention
from diffsparse.kernels.backends.cpu import compiler, instructions
from diffsparse.kernels.backends.cpu.compiler import SWITCH, compile_with
from diffsparse.kernels.backends.cpu.instructions import ISA_SWITCH, Kernel, find_kernel
from tests.kernels.cases import MIXED, inputs, kernel_isas, random_layout

needs_compiler = pytest.mark.skipif(not kernel_isas(), reason="there is no C compiler ($CC, cc, gcc or clang)")
posix = pytest.mark.skipif(os.name != "posix", reason="a shell script stands for the compiler")
GRID = TokenGrid(1, 9, 13)


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SWITCH, ISA_SWITCH):
        monkeypatch.delenv(name, raising=False)


def run() -> torch.Tensor:
    layout = random_layout(GRID, MIXED[:1], 64, 0.5, diagonal=True)
    return sparse_attention(*inputs(GRID, 1, 16), layout, backend="cpu", return_lse=True)[0]


@needs_compiler
@pytest.mark.parametrize("isa", kernel_isas() or ["none"])
def test_what_is_asked_for_runs_and_is_told(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_SWITCH, isa.upper())
    kernel = find_kernel()
    assert kernel.library is not None and kernel.isa == isa
    assert backend_ways()["cpu"] == f"compiled kernel for {isa} ({ISA_SWITCH}), by {kernel.compiler}"


@needs_compiler
def test_the_best_is_taken_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    best = kernel_isas()[0]
    for asked in ("", "auto"):
        monkeypatch.setenv(ISA_SWITCH, asked)
        assert find_kernel().isa == (None if best == "generic" else best)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_SWITCH, "mmx")
    with pytest.raises(ValueError, match=f"{ISA_SWITCH} is 'mmx'; on .* it takes auto.* or generic"):
        run()
    assert "is 'mmx'" in backend_ways()["cpu"]


@needs_compiler
def test_one_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(instructions._flags())
    lesser = dict.fromkeys(names, instructions._flags()["generic"])  # as on a processor that has nothing better
    monkeypatch.setattr(instructions, "_flags", lambda: lesser)
    assert instructions.instruction_sets() == ["generic"]
    monkeypatch.setenv(ISA_SWITCH, names[0])
    with pytest.raises(ValueError, match=f"asks for {names[0]}, and .* no more than generic .* takes auto or generic"):
        run()
    # By itself it is not taken there, and says why.
    monkeypatch.delenv(ISA_SWITCH)
    assert str(find_kernel()).startswith("torch's matrix products, as the kernel is not compiled: this processor has")
    run()


@needs_compiler
def test_another_kind_of_processor_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions.platform, "machine", lambda: "riscv64")
    assert find_kernel().library is None and "none of AVX-512" in str(find_kernel().reason)
    monkeypatch.setenv(ISA_SWITCH, "generic")
    assert find_kernel().isa == "generic"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "find_compiler", lambda: None)
    assert find_kernel() == Kernel(reason="no C compiler: neither $CC nor cc, gcc or clang is there")
    run()
    assert instructions.instruction_sets() == []
    monkeypatch.setenv(ISA_SWITCH, "generic")
    with pytest.raises(RuntimeError, match="asks for generic, and the kernel cannot be compiled: no C compiler"):
        run()


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    monkeypatch.setenv(ISA_SWITCH, "generic")
    monkeypatch.setattr(instructions, "compile_with", lambda *_: pytest.fail("compiled"))
    run()
    assert backend_ways()["cpu"].endswith(f"not compiled: {SWITCH}=0 switches it off")


@posix
@pytest.mark.parametrize(("says", "told"), [("no such register", "no such register$"), ("", "CalledProcessError")])
def test_a_compiler_that_fails_is_told_and_done_without(
    says: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "{says}" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, "diffsparse"):
        run(), run()
    (line,) = caplog.messages  # once
    begin = f"the CPU backend runs uncompiled, {broken} failed: "
    assert line.startswith(begin) and re.search(f"^({told})", line.removeprefix(begin))
    assert backend_ways()["cpu"].endswith(line.removeprefix("the CPU backend runs uncompiled, "))


@needs_compiler
def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
    found = find_kernel().compiler
    assert found is not None
    given = (found, instructions._SOURCE, instructions._flags()["generic"])
    assert compile_with.__wrapped__(*given).library is not None
    assert [path.suffix for path in (tmp_path / "compiled").iterdir()] == [".so"]
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert compile_with.__wrapped__(*given).library is not None
