"""One call of a pipeline: an input, a seed and settings go in, its output comes out, and mistakes are one line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from diffsparse.search.columns import printable, shorten
from diffsparse.search.errors import BadInput
from diffsparse.search.inputs import GenerationInput, as_input
from diffsparse.search.modular import call_modular, is_modular
from diffsparse.search.signature import inputs_beside_prompt

__all__ = ["call_pipeline", "denoisers", "sizes_seen"]

#: How often to ask a pipeline again for a size that it keeps. What it chose is mostly one, or next to one.
TRIES = 6


def denoisers(pipe: Any) -> list[torch.nn.Module]:
    """The pipeline's denoising networks (two in Wan 2.2)."""
    found = [pipe.components.get(name) for name in ("transformer", "transformer_2", "unet")]
    return [module for module in found if isinstance(module, torch.nn.Module)]


def call_pipeline(pipe: Any, prompt: GenerationInput, seed: int, settings: Any, output_type: str, **more: Any) -> Any:
    """``pipe(prompt, ...)``, or with other inputs, under a :class:`GenerationSettings`; ``more`` goes along as it is.

    The noise comes from a generator on the CPU, so a seed means the same noise on every device.

    Raises :class:`BadInput` where the pipeline stops before its first step, with its own words; where it does not take
    an argument or needs another one; and where it makes another size than was asked for, before the first step.
    """
    source = as_input(prompt)
    arguments = settings.arguments(pipe, source.arguments) | source.load(pipe) | {"output_type": output_type} | more
    try:
        return _call(pipe, seed, arguments)
    except _OtherSize as other:
        raise BadInput(_does_not_hold(pipe, seed, arguments, other)) from None


def _call(pipe: Any, seed: int, arguments: dict[str, Any]) -> Any:
    generator = torch.Generator("cpu").manual_seed(seed)
    begun: list[bool] = []

    def begin(*_: Any) -> None:
        begun.append(True)

    # First of all hooks: what another one raises did not come from the pipeline's inputs.
    handles = [m.register_forward_pre_hook(begin, prepend=True) for m in denoisers(pipe)]
    try:
        with torch.no_grad(), _size_kept(pipe, _asked(arguments)):
            arguments = arguments | {"generator": generator}
            return call_modular(pipe, arguments) if is_modular(pipe) else pipe(**arguments)
    except (_OtherSize, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if begun:
            raise
        raise BadInput(_before_first_step(pipe, error, arguments)) from error
    finally:
        for handle in handles:
            handle.remove()


# -- what a pipeline says ----------------------------------------------------------------------------------------------


def _before_first_step(pipe: Any, error: Exception, given: Collection[str]) -> str:
    """Why the pipeline did not come to its first step, in one line."""
    name = type(pipe).__name__
    if (package := _missing_package(error)) is not None:
        return f"{name} needs the package {package}, which is not installed: pip install {package}"
    words = printable(shorten(str(error), 300)).rstrip(".: ")
    line = f"{name} stopped before its first step: {type(error).__name__}" + (f": {words}" if words else "")
    if inputs := [name for name in inputs_beside_prompt(pipe) if name not in given]:
        line += f". Its call also takes {', '.join(inputs)}: inputs in JSON lines can give them"
    return line


def _missing_package(error: Exception) -> str | None:
    """The package that the error is about, where it is not installed.

    Libraries import what is optional only where it is there, so that its use without it is a NameError.
    """
    name = getattr(error, "name", None) if isinstance(error, (NameError, ImportError)) else None
    if not isinstance(name, str):
        return None
    package = name.partition(".")[0]
    return package if isinstance(error, ImportError) or find_spec(package) is None else None


# -- sizes -------------------------------------------------------------------------------------------------------------


@contextmanager
def sizes_seen(pipe: Any, callback: Callable[[int, int], None]) -> Iterator[None]:
    """Within, ``callback`` gets the height and width for which the pipeline prepares latents, before it does.

    Pipelines may round a size or take the nearest of a list; here they say what they go on with. Those whose
    ``prepare_latents`` knows no height and width are not watched.
    """
    original = getattr(pipe, "prepare_latents", None)
    signature = inspect.signature(original) if callable(original) else None
    if original is None or signature is None or not {"height", "width"} <= set(signature.parameters):
        yield
        return

    @functools.wraps(original)  # so that its signature is seen, should it be watched twice
    def prepare(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        height, width = given.get("height"), given.get("width")
        if isinstance(height, int) and isinstance(width, int):
            callback(height, width)
        return original(*args, **kwargs)

    own = pipe.__dict__.get("prepare_latents")
    pipe.prepare_latents = prepare
    try:
        yield
    finally:
        if own is None:
            del pipe.prepare_latents
        else:
            pipe.prepare_latents = own


class _OtherSize(Exception):
    """The pipeline goes on with another size than it was asked for."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__(height, width)
        self.height, self.width = height, width


def _asked(arguments: dict[str, Any]) -> dict[str, int]:
    return {name: arguments[name] for name in ("height", "width") if arguments.get(name) is not None}


@contextmanager
def _size_kept(pipe: Any, sizes: dict[str, int]) -> Iterator[None]:
    """Within, a pipeline that goes on with another size than ``sizes`` (in pixels) raises :class:`_OtherSize`."""

    def check(height: int, width: int) -> None:
        seen = {"height": height, "width": width}
        if any(seen[name] != value for name, value in sizes.items()) and not _in_latents(sizes, seen):
            raise _OtherSize(height, width)

    if not sizes:
        yield
        return
    with sizes_seen(pipe, check):
        yield


def _in_latents(sizes: dict[str, int], seen: dict[str, int]) -> bool:
    """Is the size the one that was asked for, counted in latents? These are at least 4 pixels large."""
    ratios = [divmod(value, seen[name]) for name, value in sizes.items() if seen[name] > 0]
    factors = {factor for factor, _ in ratios}
    return len(ratios) == len(sizes) and len(factors) == 1 and min(factors) >= 4 and not any(rest for _, rest in ratios)


class _Held(Exception):
    """The size that a pipeline was asked for is the one it goes on with."""


def _does_not_hold(pipe: Any, seed: int, arguments: dict[str, Any], other: _OtherSize) -> str:
    """The message for a size that the pipeline changes, with the nearest one that it keeps."""

    def stop(height: int, width: int) -> None:
        raise _Held if (height, width) == (tried.height, tried.width) else _OtherSize(height, width)

    tried, advice = other, "leave the size out"
    for _ in range(TRIES):
        try:
            with torch.no_grad(), sizes_seen(pipe, stop):
                pipe(generator=torch.Generator("cpu").manual_seed(seed), **arguments | vars(tried))
        except _Held:
            advice = f"ask for --height {tried.height} --width {tried.width}, or leave the size out"
            break
        except _OtherSize as another:
            tried = another
        except Exception:  # this size it does not take at all: then there is none to name
            break
    asked = " ".join(f"--{name} {value}" for name, value in _asked(arguments).items())
    return (
        f"{asked}: {type(pipe).__name__} chooses its size by itself and would make {other.width} x {other.height} "
        f"pixels (width x height) of it; {advice}"
    )
