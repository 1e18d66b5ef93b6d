"""Patterns are found by themselves, and one of a user's own is read from plan files like any other."""

import json
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import ClassVar, Literal

import numpy as np
import pytest

import diffsparse
from diffsparse import patterns
from diffsparse.grid import TokenGrid
from diffsparse.order import RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Full, Pattern, Sink, pattern_kinds, registry
from diffsparse.plan import PlanError, SparsityPlan


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


@dataclass(frozen=True)
class Checkers(Pattern):
    """Every ``every``-th block of keys, and what ``around`` keeps."""

    every: int
    start: float | None = None
    colour: Literal["black", "white"] = "black"
    order: TokenOrder = field(default_factory=RasterOrder)
    boxes: tuple[tuple[int, str], ...] = ()
    around: Pattern = field(default_factory=Full)
    kind: ClassVar[str] = "checkers"

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")

    def pairs(self, queries, keys):
        wanted = np.arange(keys.num_blocks) % self.every == (self.colour == "white")
        return np.broadcast_to(wanted, (queries.num_blocks, keys.num_blocks)) & self.around.pairs(queries, keys)


def files(pattern) -> bytes:
    return SparsityPlan.uniform(diffsparse.HeadEntry(pattern=pattern)).to_files()["sparse_plan.json"]


def test_every_pattern_of_a_module_is_known():
    found = {}
    for module in iter_modules(patterns.__path__):
        for value in vars(import_module(f"diffsparse.patterns.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Pattern) and value.kind:
                found[value.kind] = value
    assert pattern_kinds() == dict(sorted(found.items()))
    assert {cls.__name__ for cls in found.values()} <= set(patterns.__all__)


def test_a_pattern_of_ones_own_is_read_from_plan_files():
    diffsparse.register_pattern(Checkers)
    pattern = Checkers(2, 0.5, "white", TileOrder(1, 8, 8), ((1, "a"), (2, "b")), Full() & Full()) | Sink(1)
    plan = SparsityPlan.from_json(files(pattern))
    assert plan.entries[0].pattern == pattern
    assert plan.layout(0, "any", 2, TokenGrid(2, 16, 16)).mask(0).float().mean() == 0.75
    assert pattern.family == "checkers|sink"
    assert ("checkers 0: every", 2) in pattern.parameters()
    assert min(pattern.preview(TokenGrid(2, 16, 16)).size) >= 256


def test_without_it_the_message_says_what_to_do():
    diffsparse.register_pattern(Checkers)
    content = files(Checkers(2))
    del registry._KINDS["checkers"]
    with pytest.raises(PlanError, match=r"unknown pattern kind 'checkers.*diffsparse\.register_pattern"):
        SparsityPlan.from_json(content)
    with pytest.raises(PlanError, match=r"cannot carry a Checkers: call diffsparse\.register_pattern"):
        files(Checkers(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 2.0}, r"entries\[0\].pattern.every must be an integer, got 2.0"),
        ({"every": True}, "every must be an integer, got True"),
        ({"every": 0}, r"entries\[0\].pattern: every must be at least 1"),
        ({"every": 10**30}, "every must lie within"),
        ({"start": "1"}, "start must be a number or null, got '1'"),
        ({"colour": "red"}, "colour must be one of black, white; got 'red'"),
        ({"colour": 3}, "colour must be one of black, white, got 3"),
        ({"order": "spiral"}, "order: unknown token order 'spiral'"),
        ({"boxes": [[1, 2]]}, r"boxes\[0\]\[1\] must be a string, got 2"),
        ({"boxes": [[1]]}, r"boxes\[0\] must be a list of 2, got \[1\]"),
        ({"around": 5}, "around must be a pattern, got 5"),
        ({"around": {"kind": "window"}}, "'window' lacks size"),
        ({"speed": 1}, "does not know: speed"),
    ],
)
def test_its_fields_are_checked_by_their_types(changes, message):
    diffsparse.register_pattern(Checkers)
    data = json.loads(files(Checkers(2)))
    data["entries"][0]["pattern"] |= changes
    with pytest.raises(PlanError, match=message):
        SparsityPlan.from_json(json.dumps(data).encode())


def test_a_kind_is_given_once():
    @dataclass(frozen=True)
    class Other(Pattern):
        kind: ClassVar[str] = "checkers"

    diffsparse.register_pattern(Checkers)
    diffsparse.register_pattern(Checkers)  # the same again is no mistake
    with pytest.raises(ValueError, match="the kind 'checkers' is taken"):
        diffsparse.register_pattern(Other)
    diffsparse.register_pattern(Other, replace=True)
    assert pattern_kinds()["checkers"] is Other


def make(kind="mine", frozen=True, base=Pattern, hint=int):
    space = {"__annotations__": {"size": hint}, "size": 1}
    if kind is not None:
        space["kind"] = kind
    cls = type("Mine", (base,), space)
    return dataclass(frozen=True)(cls) if frozen else cls


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (5, "takes a subclass"),
        (make(kind=None), "kind of its own"),
        (make(frozen=False), "frozen dataclass"),
        (make(kind="two words"), "a word such as"),
        (make(hint=dict), "cannot hold"),
        (make(hint=list[int]), "cannot hold"),
    ],
)
def test_classes_that_files_cannot_carry_are_refused(cls, message):
    with pytest.raises(TypeError, match=message):
        diffsparse.register_pattern(cls)


def test_retired_kinds_stay_taken():
    with pytest.raises(ValueError, match="taken"):
        diffsparse.register_pattern(make(kind="text_rows"))
