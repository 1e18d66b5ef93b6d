"""Frozen dataclasses from JSON values and back, by the types of their fields.

A type says what its JSON value must be. Nothing is converted: a boolean is not a number, and 64.0 is not an integer.
The known types are ``int``, ``float`` (an integer is one too), ``bool``, ``str``, ``None``, ``Literal``, ``|`` of
these, tuples of a given or of any length, ``bytes`` (an array of the plan's safetensors file, by its name), grids,
orders, and classes for which :func:`know` was called. Everything wrong is a :class:`PlanError` that says where it is.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.limits import MAX_GRID_TOKENS, MAX_INTEGER, MAX_ITEMS, MAX_NAME
from diffsparse.messages import named, shown
from diffsparse.order import TokenOrder, parse_order

__all__ = ["PlanError", "Reading", "Shape", "know", "plain", "read_fields", "read_object", "shape_of", "shapes_of"]


class PlanError(ValueError):
    """A plan that cannot be read, or that does not belong to the model at hand."""


@dataclass
class Reading:
    """What is needed while one file is read. ``arrays``: those of its safetensors file, by name."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    depth: int = 0
    parts: int = 0
    _bytes: dict[str, bytes] = field(default_factory=dict)

    def bytes_of(self, name: str, where: str) -> bytes:
        """One array's bytes; entries that name the same array share them."""
        if name not in self._bytes:
            if name not in self.arrays:
                raise PlanError(f"{where} names a bitmap {shown(name)} that the plan's safetensors file does not hold")
            array = self.arrays[name]
            if array.dtype != np.uint8 or array.ndim != 1:
                raise PlanError(
                    f"{where}: the array {shown(name)} must be uint8 [bytes], got {array.dtype} {shown(array.shape)}"
                )
            self._bytes[name] = array.tobytes()
        return self._bytes[name]


@dataclass(frozen=True)
class Shape:
    """What a type is in JSON. ``accepts``: types of JSON values; ``read(value, where, reading)`` is for these only."""

    words: str
    accepts: tuple[type, ...]
    read: Callable[[Any, str, Reading], Any]

    def __call__(self, value: Any, where: str, reading: Reading) -> Any:
        if type(value) not in self.accepts:
            raise PlanError(f"{where} must be {self.words}, got {shown(value)}")
        return self.read(value, where, reading)


def _integer(value: int, where: str, reading: Reading) -> int:
    if not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise PlanError(f"{where} must lie within {MAX_INTEGER:,}, got {shown(value)}")
    return value


def _number(value: float, where: str, reading: Reading) -> float:
    if isinstance(value, int):
        return _integer(value, where, reading)
    if not math.isfinite(value):
        raise PlanError(f"{where} must be a finite number, got {value}")
    return value


def _name(value: str, where: str, reading: Reading) -> str:
    if len(value) > MAX_NAME or not value.isprintable():
        raise PlanError(
            f"{where} must be a name of at most {MAX_NAME} characters, none a control character, got {shown(value)}"
        )
    return value


def _grid(value: list[Any], where: str, reading: Reading) -> TokenGrid:
    if len(value) != 3 or any(type(n) is not int or n < 1 for n in value):
        raise PlanError(f"{where} must be three integers [frames, height, width] of at least 1, got {shown(value)}")
    if math.prod(value) > MAX_GRID_TOKENS:
        raise PlanError(
            f"{where} has more than {MAX_GRID_TOKENS:,} tokens, the most that a grid may have: {shown(value)}"
        )
    return TokenGrid(*value)


def _order(value: str, where: str, reading: Reading) -> TokenOrder:
    try:
        return parse_order(value)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from error


_KNOWN: dict[Any, Shape] = {
    int: Shape("an integer", (int,), _integer),
    float: Shape("a number", (int, float), _number),
    bool: Shape("true or false", (bool,), lambda value, where, reading: value),
    str: Shape("a string", (str,), _name),
    type(None): Shape("null", (type(None),), lambda value, where, reading: None),
    bytes: Shape("the name of an array", (str,), lambda value, where, reading: reading.bytes_of(value, where)),
    TokenGrid: Shape("a grid [frames, height, width]", (list,), _grid),
    TokenOrder: Shape("an order", (str,), _order),
}


def know(cls: type, shape: Shape) -> None:
    """From now on fields of this type are read so."""
    _KNOWN[cls] = shape
    shape_of.cache_clear()
    shapes_of.cache_clear()


@cache
def shape_of(hint: Any) -> Shape:
    """What a field of this type is in JSON. Raises TypeError for a type that plan files cannot hold."""
    if hint in _KNOWN:
        return _KNOWN[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _any_of([shape_of(part) for part in inner])
    if origin is Literal:
        return _choice(inner)
    if origin is tuple and inner:
        if inner[-1] is Ellipsis:
            return _list_of(shape_of(inner[0]))
        return _tuple_of([shape_of(part) for part in inner])
    raise TypeError(
        f"plan files cannot hold a {hint!r}; use int, float, bool, str, None, tuples and Literal of these, or a pattern"
    )


def _any_of(shapes: list[Shape]) -> Shape:
    def read(value: Any, where: str, reading: Reading) -> Any:
        return next(s for s in shapes if type(value) in s.accepts).read(value, where, reading)

    words = ", ".join(s.words for s in shapes[:-1]) + f" or {shapes[-1].words}"
    return Shape(words, tuple(t for s in shapes for t in s.accepts), read)


def _choice(allowed: tuple[Any, ...]) -> Shape:
    words = f"one of {', '.join(map(str, allowed))}"

    def read(value: Any, where: str, reading: Reading) -> Any:
        if value not in allowed:
            raise PlanError(f"{where} must be {words}; got {shown(value)}")
        return value

    return Shape(words, tuple({type(v) for v in allowed}), read)


def _list_of(shape: Shape) -> Shape:
    def read(value: list[Any], where: str, reading: Reading) -> tuple[Any, ...]:
        if len(value) > MAX_ITEMS:
            raise PlanError(f"{where} must have at most {MAX_ITEMS:,} items, got {len(value):,}")
        return tuple(shape(item, f"{where}[{i}]", reading) for i, item in enumerate(value))

    return Shape("a list", (list,), read)


def _tuple_of(shapes: list[Shape]) -> Shape:
    words = f"a list of {len(shapes)}"

    def read(value: list[Any], where: str, reading: Reading) -> tuple[Any, ...]:
        if len(value) != len(shapes):
            raise PlanError(f"{where} must be {words}, got {shown(value)}")
        return tuple(shape(item, f"{where}[{i}]", reading) for i, (shape, item) in enumerate(zip(shapes, value)))

    return Shape(words, (list,), read)


@cache
def shapes_of(cls: type) -> tuple[dict[str, Shape], frozenset[str]]:
    """A dataclass's fields by name, and which of them have no default."""
    hints = get_type_hints(cls)
    found = fields(cls)  # type: ignore[arg-type]
    required = frozenset(f.name for f in found if f.default is MISSING and f.default_factory is MISSING)
    return {f.name: shape_of(hints[f.name]) for f in found}, required


def read_fields(cls: type, data: Any, what: str, where: str, reading: Reading, extra: str = "") -> dict[str, Any]:
    """A dataclass's arguments from a JSON object, which may have the key ``extra`` too. ``what``: it, in messages."""
    if type(data) is not dict:
        raise PlanError(f"{what} must be an object, got {shown(data)}")
    shapes, required = shapes_of(cls)
    if unknown := [name for name in data if name not in shapes and name != extra]:
        raise PlanError(f"{what} has keys this version does not know: {named(sorted(unknown))}; update diffsparse")
    if missing := sorted(required - data.keys()):
        raise PlanError(f"{what} lacks {', '.join(missing)}")
    return {
        name: shape(data[name], f"{where}.{name}" if where else name, reading)
        for name, shape in shapes.items()
        if name in data
    }


def read_object(cls: type, data: Any, what: str, where: str, reading: Reading, extra: str = "") -> Any:
    """A dataclass from a JSON object: :func:`read_fields`, and what the class itself refuses."""
    values = read_fields(cls, data, what, where, reading, extra)
    try:
        return cls(**values)
    except PlanError:
        raise
    # What a pattern from outside raises for bad parameters is its own matter; here all of it means a bad file.
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise PlanError(f"{where or what}: {error}") from error


def plain(value: Any, arrays: dict[str, np.ndarray], encode: Callable[[Any, dict[str, np.ndarray]], Any]) -> Any:
    """A field's value as JSON values; bytes go into ``arrays``. ``encode``: for patterns inside it."""
    if isinstance(value, TokenOrder):
        return str(value)
    if isinstance(value, TokenGrid):
        return list(value.shape)
    if isinstance(value, bytes):
        name = f"bitmap_{len(arrays)}"
        arrays[name] = np.frombuffer(value, np.uint8)
        return name
    if isinstance(value, tuple):
        return [plain(v, arrays, encode) for v in value]
    return encode(value, arrays) if hasattr(value, "__dataclass_fields__") else value
