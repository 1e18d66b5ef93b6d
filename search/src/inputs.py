"""What a generation is made from: the arguments of one call of a pipeline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffsparse.search.columns import printable, shorten
from diffsparse.search.errors import BadInput
from diffsparse.search.load import prompts_in, text_of
from diffsparse.search.media import Media, media_of
from diffsparse.search.signature import (
    PLAIN,
    RESERVED,
    SHORTENING,
    check_generates,
    takes_files,
)

__all__ = [
    "GenerationInput",
    "Input",
    "as_input",
    "as_inputs",
    "check_inputs",
    "contents",
    "read_inputs",
]

#: Endings of files with one JSON object a line.
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, eq=False)
class Input:
    """The arguments of one call of a pipeline, beside the settings that all calls have in common.

    ``name``: for tables and messages; the prompt, where there is nothing else. ``arguments``: by the names of the
    pipeline's call, with :class:`~diffsparse.search.media.Media` for each file. ``where``: file and line, or nothing.
    """

    name: str
    arguments: Mapping[str, Any]
    where: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether it is a prompt and nothing else."""
        return tuple(self.arguments) == PLAIN and isinstance(self.arguments["prompt"], str)

    @cached_property
    def content(self) -> Any:
        """What tells it from other inputs, as a JSON value: the prompt alone, or all arguments, files by content."""
        if self.is_plain:
            return self.arguments["prompt"]
        return {name: _content(value) for name, value in sorted(self.arguments.items())}

    def load(self, pipe: Any) -> dict[str, Any]:
        """Keyword arguments for the pipeline's call, with pictures and clips read."""
        return {name: _loaded(value, pipe) for name, value in self.arguments.items()}


#: What stands for an :class:`Input` in Python: a prompt, or arguments by name.
GenerationInput = str | Mapping[str, Any] | Input


# -- from Python -------------------------------------------------------------------------------------------------------


def as_input(value: GenerationInput, root: Path | None = None, where: str = "") -> Input:
    """An :class:`Input` of a prompt or of arguments by name. Paths are relative to ``root``, or to where Python runs.

    Raises :class:`BadInput` for a file that is not there or holds something else, and for arguments that are settings.
    """
    if isinstance(value, Input):
        return value
    said = f"{where}: " if where else ""
    if isinstance(value, str):
        return Input(value, {"prompt": value}, where)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise BadInput(f"{said}an input is a prompt or arguments by name, got {_shown(value)}")
    if not value:
        raise BadInput(f"{said}an input without arguments; give at least a prompt")
    for name in value:
        if name in RESERVED:
            raise BadInput(f"{said}{name} cannot be given for one input: {RESERVED[name]}")
    try:
        arguments = {
            name: media_of(name, item, root or Path()) if _may_hold_files(name, item) else item
            for name, item in value.items()
        }
    except BadInput as error:
        raise BadInput(f"{said}{error}") from None
    return Input(_name(arguments), arguments, where)


def as_inputs(values: Iterable[GenerationInput]) -> tuple[Input, ...]:
    """Each as an :class:`Input`, each once, and each with a name of its own. Raises :class:`BadInput`."""
    if isinstance(values, (str, Mapping, Input)):
        raise BadInput(f"inputs are a list, got one by itself ({_shown(values)}); put it in brackets")
    found: dict[str, Input] = {}
    taken: set[str] = set()
    for value in values:
        one = as_input(value)
        key = json.dumps(one.content)
        if key in found:
            continue
        name, count = one.name, 1
        while name in taken:
            count += 1
            name = f"{one.name} ({count})"
        taken.add(name)
        found[key] = one if name == one.name else replace(one, name=name)
    return tuple(found.values())


def contents(inputs: Sequence[Input]) -> list[Any]:
    """What tells inputs from others, as JSON values; a list of prompts where they are nothing else."""
    return [one.content for one in inputs]


def _may_hold_files(name: str, value: Any) -> bool:
    # The members of a list of conditions say by their own names what they are.
    return takes_files(name) or name == "conditions" or name.endswith("_conditions")


def _name(arguments: Mapping[str, Any]) -> str:
    """A line that tells an input from others, as far as a line can."""
    prompt = arguments.get("prompt")
    rest = ", ".join(f"{n}: {_shown(v)}" for n, v in arguments.items() if n != "prompt")
    if not isinstance(prompt, str):
        return rest if prompt is None else f"prompt: {_shown(prompt)}, {rest}"
    return f"{prompt} [{rest}]" if rest else prompt


def _shown(value: Any) -> str:
    if isinstance(value, Media):
        return value.written
    if isinstance(value, list) and value:
        return _shown(value[0]) + (f" and {len(value) - 1} more" if len(value) > 1 else "")
    if isinstance(value, (str, int, float, bool, type(None))):
        return printable(shorten(str(value), 60))
    if isinstance(value, Mapping):
        return printable(shorten(", ".join(f"{n} {_shown(v)}" for n, v in value.items()), 60))
    return type(value).__name__


def _content(value: Any) -> Any:
    """A JSON value that is equal for equal arguments."""
    if isinstance(value, Media):
        return {"sha256": value.digest}
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(name): _content(item) for name, item in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_content(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _content({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    try:
        array = np.ascontiguousarray(np.asarray(value))  # of a PIL image its pixels
    except (TypeError, ValueError):
        array = None
    if array is None or array.dtype.hasobject:
        raise BadInput(f"an input holds a {type(value).__name__}, which cannot be told from another one; give files, "
                       "pictures, arrays, texts or numbers")  # fmt: skip
    about = f"{array.dtype} {array.shape}"
    return {"sha256": hashlib.sha256(about.encode() + array.tobytes()).hexdigest()}


# -- files -------------------------------------------------------------------------------------------------------------


def read_inputs(path: str | os.PathLike[str]) -> tuple[Input, ...]:
    """The inputs of a file, each once: a text file with one prompt a line, or JSON lines.

    JSON lines are files that end in .jsonl, and those whose first line starts with a brace. Paths in them are relative
    to the file. Empty lines and lines that start with ``#`` do not count.
    Raises :class:`BadInput` with the file and the line.
    """
    text = text_of(path)
    first = next((line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")), "")
    if Path(path).suffix.lower() not in JSON_LINES and not first.lstrip().startswith("{"):
        return as_inputs(prompts_in(text, path))
    found = as_inputs(_json_lines(text, Path(path)))
    if not found:
        raise BadInput(f'{str(path)!r} holds no input; write one JSON object a line, {{"prompt": "..."}}')
    return found


def _json_lines(text: str, path: Path) -> Iterator[Input]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            value = json.loads(line, object_pairs_hook=_object, parse_constant=_no_number)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}: no valid JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: {error}") from None
        if not isinstance(value, dict):
            raise BadInput(f'{where}: an input is a JSON object, {{"prompt": "..."}}, got {_shown(value)}')
        yield as_input(value, path.parent, where)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{printable(shorten(twice, 60))} stands twice; leave one out")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number that an argument can be")


# -- with a pipeline ---------------------------------------------------------------------------------------------------


def check_inputs(pipe: Any, inputs: Sequence[Input]) -> None:
    """Raises :class:`BadInput`, before anything runs, where the pipeline does not take an input or needs more.

    Also where inputs differ in what must be the same for all: the share of the steps that runs.
    """
    for one in inputs:
        _with_place(one, lambda one=one: check_generates(pipe, one.arguments))  # type: ignore[misc]
        for name in SHORTENING:
            value = one.arguments.get(name)
            if isinstance(value, bool) or (isinstance(value, (int, float)) and not 0 < value <= 1):
                raise BadInput(f"{_place(one)}{name} is a share above 0 and at most 1, got {_shown(value)}")
            if _content(value) != _content(inputs[0].arguments.get(name)):
                raise BadInput(
                    f"{_place(one)}{name} is {_shown(value)}, and {_shown(inputs[0].arguments.get(name))} in the first "
                    "input; all inputs must go through the same steps, so give the same to all"
                )


def _place(one: Input) -> str:
    return f"{one.where}: " if one.where else ""


def _with_place(one: Input, check: Any) -> None:
    try:
        check()
    except BadInput as error:
        raise BadInput(f"{_place(one)}{error}") from None


def _loaded(value: Any, pipe: Any) -> Any:
    if isinstance(value, Media):
        return value.load()
    if isinstance(value, dict):
        return _condition({name: _loaded(item, pipe) for name, item in value.items()}, pipe)
    if isinstance(value, list):
        return [_loaded(item, pipe) for item in value]
    return value


def _condition(members: dict[str, Any], pipe: Any) -> Any:
    """An object among the arguments as the pipeline's own class of conditions, where it has one."""
    module = sys.modules.get(type(pipe).__module__)
    for cls in vars(module).values() if module else ():
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__name__.endswith("Condition"):
            known = [f.name for f in dataclasses.fields(cls)]
            if unknown := sorted(set(members) - set(known)):
                raise BadInput(f"a condition takes no {', '.join(unknown)}; it takes {', '.join(known)}")
            return cls(**members)
    return members
