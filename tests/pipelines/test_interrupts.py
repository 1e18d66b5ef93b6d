"""Ctrl-C in the middle of a forward, which passes torch's hooks by: nothing that runs afterwards is misled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffsparse.pipelines import enable_sparse_attention, sparse_attention_summary
from diffsparse.pipelines.context import CTX
from tests.pipelines.models import mixed_plan, run, wan, wan_inputs

INPUTS = wan_inputs(3, 7, 9)
TOKENS = torch.randn(1, 189, 48, generator=torch.Generator().manual_seed(0))  # as many as their grid has


def enabled(seed: int = 0) -> torch.nn.Module:
    model = wan(seed)
    enable_sparse_attention(model, mixed_plan(model))
    return model


def fail_in(model: torch.nn.Module, where: str, error: type[BaseException]) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return model.get_submodule(where).register_forward_pre_hook(fail)


def interrupted(model: torch.nn.Module, where: str, error: type[BaseException] = KeyboardInterrupt) -> BaseException:
    """The error of a forward that is stopped at a module: with its traceback, as a notebook keeps it."""
    handle = fail_in(model, where, error)
    with pytest.raises(error) as caught:
        run(model, INPUTS)
    handle.remove()
    return caught.value


def on_its_own(model: torch.nn.Module, layer: int) -> torch.Tensor:
    with torch.no_grad():
        return model.blocks[layer].attn1(TOKENS)


def during(model: torch.nn.Module, what: Callable[[], object]) -> torch.Tensor:
    """A forward in the middle of which something else is done."""
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: what() and None)
    out = run(model, INPUTS)
    handle.remove()
    return out


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_torch_calls_hooks_after_exceptions_alone(error: type[BaseException]) -> None:
    """Where this fails torch has changed: then the hook after a forward can say that it has ended."""
    called = []
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module.register_forward_hook(lambda *_: called.append(1), always_call=True)
    fail_in(module, "0", error)
    with pytest.raises(error):
        module(torch.zeros(1, 2))
    assert bool(called) is issubclass(error, Exception)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0", "blocks.1.ffn"])
def test_a_layer_called_on_its_own_afterwards_runs_dense(error: type[BaseException], where: str) -> None:
    model = enabled()
    kept = interrupted(model, where, error)
    calls = sparse_attention_summary(model).transformers["transformer"].sparse_calls
    for layer in (1, 0):
        assert torch.equal(on_its_own(model, layer), on_its_own(wan(), layer))
    assert sparse_attention_summary(model).transformers["transformer"].sparse_calls == calls
    assert CTX.call is None, "an interrupt's forward would keep its tensors"
    assert kept.__traceback__ is not None


@pytest.mark.parametrize("where", ["blocks.0.attn1.to_q", "blocks.1.ffn"])
def test_the_next_generation_is_as_if_nothing_was(where: str) -> None:
    model, other = enabled(), wan(1)
    expected, dense = run(model, INPUTS), run(other, INPUTS)
    kept = interrupted(model, where)
    assert torch.equal(run(other, INPUTS), dense)
    assert torch.equal(run(model, INPUTS), expected)
    found = sparse_attention_summary(model).transformers["transformer"]
    assert (found.forwards, found.sparse_calls) == (2, 4), "the interrupted forward does not count"
    assert kept.__traceback__ is not None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_model_goes_on_after_it_caught_the_interrupt_of_one_inside_it(error: type[BaseException]) -> None:
    outer, inner = enabled(), enabled(1)
    expected = run(outer, INPUTS)
    kept: list[BaseException] = []
    found = during(outer, lambda: kept.append(interrupted(inner, "blocks.1.attn1.to_q", error)))
    assert torch.equal(found, expected)
    counts = sparse_attention_summary(outer).transformers["transformer"]
    assert (counts.forwards, counts.sparse_calls, counts.dense_calls) == (2, 4, 0)
    assert CTX.call is None and CTX.layer is None and kept


def test_a_layer_of_another_model_has_no_part_in_a_forward() -> None:
    outer, other = enabled(), enabled(1)
    expected, dense = run(outer, INPUTS), on_its_own(wan(1), 0)
    found: list[torch.Tensor] = []
    assert torch.equal(during(outer, lambda: found.append(on_its_own(other, 0))), expected)
    assert torch.equal(found[0], dense)
    counts = sparse_attention_summary(outer).transformers["transformer"]
    assert (counts.sparse_calls, counts.dense_calls) == (4, 0)


def test_an_interrupt_in_one_thread_is_none_in_another() -> None:
    outer, other = enabled(), enabled(1)
    expected = run(outer, INPUTS)
    alone: list[torch.Tensor] = []

    def work() -> None:
        interrupted(other, "blocks.0.attn1.to_q")
        alone.append(on_its_own(other, 0))

    def in_a_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    assert torch.equal(during(outer, in_a_thread), expected)
    assert torch.equal(alone[0], on_its_own(wan(1), 0))
