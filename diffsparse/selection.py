"""Who picks a head's blocks at denoising time: a rule that reads q and k, what it may keep, and how often it is asked.

A rule's parameters are numbers by name. What rules compute is the business of ``diffsparse.kernels.select``; here is as
much as plans and layouts have to know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from diffsparse.limits import MAX_INTEGER
from diffsparse.messages import shown

__all__ = [
    "BUDGETS",
    "CADENCES",
    "RULES",
    "Budget",
    "OnlineSelection",
    "Parameter",
    "SHARE_ROUNDING",
    "add_rule",
    "is_due",
    "rule_names",
    "share_of",
]

BudgetKind = Literal[
    "density",
    "top_k",
    "top_p",
    "top_p_head",
    "quantile",
    "weight",
    "score",
    "top_p_heads",
    "quantile_heads",
    "recall_heads",
    "best_heads",
]
#: What ``Budget.kind`` may be.
BUDGETS: tuple[str, ...] = get_args(BudgetKind)
#: What a cadence may be, beside a list of noise levels.
CADENCES = ("call", "once", "shrink")
#: A share of so many blocks is rounded up, unless it is a whole number but for rounding.
SHARE_ROUNDING = 1e-9


@dataclass(frozen=True)
class Parameter:
    """A number that a rule takes. Where ``default`` is an integer, so is every value. ``least``, ``most``: the
    bounds."""

    default: float
    least: float = -math.inf
    most: float = math.inf

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, or None."""
        whole = isinstance(self.default, int)
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        if type(value) in kinds and math.isfinite(value) and self.least <= value <= self.most:  # type: ignore[arg-type, operator]
            return None
        bounds = f" from {self.least:,} to {self.most:,}" if math.isfinite(self.most) else ""
        return f"{'an integer' if whole else 'a number'}{bounds}, got {shown(value)}"


#: The rules of this library, with their parameters.
RULES: dict[str, dict[str, Parameter]] = {
    "pooled": {},
    "pooled_max": {},
    "sub_block": {"parts": Parameter(4, 1, 16)},
    "antidiagonal": {"stride": Parameter(8, 1, 64)},
    "mass": {"rows": Parameter(4, 1, 128)},
    "sampled_max": {"samples": Parameter(16, 1, 128), "relative": Parameter(0, 0, 1)},
    "vertical_slash": {"rows": Parameter(64, 1, 4096)},
    "key_means": {"beside": Parameter(0, 0, 64)},
    "spread": {"beside": Parameter(0, 0, 64), "first": Parameter(0, 0, 64)},
    "self_similar": {"similarity": Parameter(0.6, -1, 1)},
    "low_bit": {"samples": Parameter(16, 1, 128)},
    "anchor": {},
    "proxy": {"together": Parameter(4, 1, 128), "samples": Parameter(16, 1, 128)},
    "tree": {"share": Parameter(0.125, 0.001, 1), "samples": Parameter(4, 1, 128)},
    "switch": {"tau": Parameter(0.1, 0, 1), "blocks": Parameter(4, 1, 64), "rows": Parameter(64, 1, 4096)},
    "clusters": {"queries": Parameter(32, 1, 1024), "keys": Parameter(64, 1, 1024), "rounds": Parameter(2, 0, 16)},
    "spatial_temporal": {"share": Parameter(0.25, 0.001, 1), "rows": Parameter(64, 1, 4096)},
    "tail_error": {"parts": Parameter(16, 1, 128)},
}
_ADDED: dict[str, dict[str, Parameter]] = {}
_BY_THEMSELVES: set[str] = set()


def rule_names() -> tuple[str, ...]:
    """Every known rule."""
    return (*RULES, *_ADDED)


def add_rule(name: str, parameters: Mapping[str, float], *, scores: bool) -> None:
    """Make a rule from outside known, with the defaults of its parameters.

    ``scores``: it scores pairs of blocks, so that every budget serves it; one that picks blocks itself takes a share.
    """
    _ADDED[name] = {key: Parameter(value) for key, value in parameters.items()}
    (_BY_THEMSELVES.discard if scores else _BY_THEMSELVES.add)(name)


def _parameters_of(rule: str) -> dict[str, Parameter]:
    return RULES.get(rule, _ADDED.get(rule, {}))


@dataclass(frozen=True)
class Budget:
    """What a rule keeps of the video's key blocks, given a score for every pair of blocks.

    Scores are natural logarithms of estimated attention weights. A row is a block of queries; its weights are the
    exponentials of its scores, divided by their sum over the blocks that it may keep.
    ``kind`` and ``value``: ``density`` keeps this share of the blocks in every row, in (0, 1], rounded up. ``top_k``
    keeps this many blocks in every row. ``top_p`` keeps in every row the fewest blocks whose weights sum to ``value``
    at least, in (0, 1]; ``top_p_head`` the fewest pairs of a head whose weights sum to that share of all of them.
    ``quantile`` keeps this share of a head's pairs, in (0, 1], those of the largest weights. ``weight`` keeps what has
    this weight at least, in [0, 1]; ``score`` what has this score at least.
    Four share out among heads, namely those of a layer that have the same selection, tail and reuse, of which each GPU
    has its own: ``top_p_heads`` keeps the fewest pairs of all of them whose weights sum to that share of all;
    ``quantile_heads`` that share of all their pairs, those of the largest weights. ``recall_heads`` is as ``density``,
    but the heads that would keep more than 0.8 of their weights so keep half as many blocks, and as many other heads,
    those that would keep least, one and a half times as many (AdaSpa, arXiv 2502.21079); at most half of the heads
    give. ``best_heads`` keeps this share of all pairs, those with the highest scores, compared as they are.
    ``least`` and ``most``: shares of a row's blocks, in [0, 1], between which every row stays, whatever the kind says.
    A row keeps one block at least, where it may keep any.
    """

    kind: BudgetKind = "density"
    value: float = 0.25
    least: float = 0.0
    most: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in BUDGETS:
            raise ValueError(f"the kind of a budget must be one of {', '.join(BUDGETS)}; got {shown(self.kind)}")
        value = Parameter(*_VALUES[self.kind])
        if (why := value.problem(self.value)) is not None or (self.kind in _SHARES and self.value == 0):
            why = why or f"a number above 0, got {self.value}"
            raise ValueError(f"the value of a budget of kind {self.kind!r} must be {why}")
        for name in ("least", "most"):
            if (why := Parameter(0.0, 0, 1).problem(getattr(self, name))) is not None:
                raise ValueError(f"a budget's {name} is a share of a row's blocks: it must be {why}")
        if self.least > self.most or self.most == 0:
            raise ValueError(
                f"a budget's least share must not be above its most, which must be above 0; "
                f"got {self.least} and {self.most}"
            )

    @property
    def is_fixed(self) -> bool:
        """Whether every row keeps a number of blocks that does not depend on q and k."""
        return self.kind in ("density", "top_k") or self.least == self.most

    @property
    def over_heads(self) -> bool:
        """Whether what a head keeps depends on the other heads."""
        return self.kind.endswith("_heads")

    def bounds(self, blocks: int) -> tuple[int, int]:
        """The fewest and the most that a row of ``blocks`` blocks keeps by ``least`` and ``most``."""
        return max(1, share_of(self.least, blocks)), max(1, share_of(self.most, blocks))

    def most_blocks(self, blocks: int) -> int:
        """The most of ``blocks`` blocks that a row keeps, over all q and k.

        Of a ``quantile`` the most on average over rows, and of a share that heads have together over them, too.
        """
        low, high = self.bounds(blocks)
        if self.kind == "top_k":
            wanted = int(self.value)
        elif self.kind == "density":
            wanted = share_of(self.value, blocks)
        else:
            # Rows that would be empty keep a block beside the share.
            shares = ("quantile", "quantile_heads", "recall_heads", "best_heads")
            wanted = share_of(self.value, blocks) + 1 if self.kind in shares else blocks
        return min(max(wanted, low), high, blocks)

    def fullest(self, mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """What would be most work: in each row of ``mask``, bool ``[N, N]``, the longest blocks that it may keep.

        lengths: tokens of each block, ``[N]``.
        """
        longest = np.argsort(-lengths, kind="stable")
        sorted_mask = mask[:, longest]
        kept = np.zeros_like(mask)
        kept[:, longest] = sorted_mask & (np.cumsum(sorted_mask, axis=1) <= self.most_blocks(len(lengths)))
        return kept

    def __str__(self) -> str:
        words = {
            "density": f"{self.value:.3g} a row",
            "top_k": f"{self.value:g} blocks a row",
            "top_p": f"weights of {self.value:.3g} a row",
            "top_p_head": f"weights of {self.value:.3g} a head",
            "quantile": f"{self.value:.3g} a head",
            "weight": f"weights from {self.value:.3g}",
            "score": f"scores from {self.value:.3g}",
            "top_p_heads": f"weights of {self.value:.3g} over heads",
            "quantile_heads": f"{self.value:.3g} over heads",
            "best_heads": f"the best {self.value:.3g} over heads",
            "recall_heads": f"{self.value:.3g} a row, by recall over heads",
        }[self.kind]
        low = f", {self.least:.3g} at least" if self.least else ""
        return words + low + (f", {self.most:.3g} at most" if self.most < 1 else "")


# Of each kind a value that is one, the least and the most that it may be.
_VALUES: dict[str, tuple[float, float, float]] = {
    "density": (0.25, 0, 1),
    "top_k": (8, 1, MAX_INTEGER),
    "top_p": (0.9, 0, 1),
    "top_p_head": (0.9, 0, 1),
    "quantile": (0.25, 0, 1),
    "weight": (0.001, 0, 1),
    "score": (0.0, -MAX_INTEGER, MAX_INTEGER),
    "top_p_heads": (0.9, 0, 1),
    "quantile_heads": (0.25, 0, 1),
    "recall_heads": (0.25, 0, 1),
    "best_heads": (0.25, 0, 1),
}
_SHARES = ("density", "top_p", "top_p_head", "quantile", "top_p_heads", "quantile_heads", "recall_heads", "best_heads")


def share_of(share: float, blocks: int) -> int:
    """A share of so many blocks, rounded up."""
    return math.ceil(share * blocks - SHARE_ROUNDING)


@dataclass(frozen=True)
class OnlineSelection:
    """A rule picks a head's blocks from the q and k of the call, among those that the entry's pattern keeps.

    ``rule``: its name (``diffsparse.kernels.selectors()``). ``budget``: what it keeps. ``parameters``: numbers by name;
    those that are left out have the rule's defaults. ``cadence``: ``call`` picks in every call; ``once`` at the first
    step, and what it picked serves until a step is dense or of another phase, or the generation ends; ``shrink`` picks
    in every call among the blocks that it picked at the step before, so that what was left out stays out for as long; a
    list of noise levels in [0, 1] picks as ``once`` does, and again at the first step at or below each level. Every
    branch of guidance has picks of its own.

    Raises ValueError for what is none of these.
    """

    rule: str
    budget: Budget = Budget()
    parameters: tuple[tuple[str, float], ...] = ()
    cadence: str | tuple[float, ...] = "call"

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or self.rule not in rule_names():
            raise ValueError(f"there is no selector {shown(self.rule)}; there are {', '.join(rule_names())}")
        if isinstance(self.budget, float):
            object.__setattr__(self, "budget", Budget("density", self.budget))
        if not isinstance(self.budget, Budget):
            raise ValueError(
                f"the budget of a selection is a Budget, or a share of the blocks; got {shown(self.budget)}"
            )
        if self.rule in _BY_THEMSELVES and (self.budget.kind, self.budget.least, self.budget.most) != (
            "density",
            0.0,
            1.0,
        ):
            raise ValueError(
                f"the selector {self.rule!r} picks blocks by itself: its budget must be of kind 'density', without a "
                f"least or a most; got {self.budget}"
            )
        self._check_parameters()
        if isinstance(self.cadence, list):
            object.__setattr__(self, "cadence", tuple(self.cadence))
        levels = self.cadence if isinstance(self.cadence, tuple) else ()
        if self.cadence not in CADENCES and not levels:
            raise ValueError(
                f"cadence must be one of {', '.join(CADENCES)}, or a list of noise levels; got {shown(self.cadence)}"
            )
        for level in levels:
            if (why := Parameter(0.0, 0, 1).problem(level)) is not None:
                raise ValueError(f"a noise level of a cadence must be {why}")

    def _check_parameters(self) -> None:
        given = self.parameters
        known = _parameters_of(self.rule)
        pairs = tuple(sorted(dict(given).items()))
        object.__setattr__(self, "parameters", pairs)
        for name, value in pairs:
            if name not in known:
                there = f"it takes {', '.join(known)}" if known else "it takes none"
                raise ValueError(f"the selector {self.rule!r} has no parameter {shown(name)}; {there}")
            if (why := known[name].problem(value)) is not None:
                raise ValueError(f"{name} of the selector {self.rule!r} must be {why}")

    @property
    def values(self) -> dict[str, float]:
        """Every parameter of the rule, those that were left out at their defaults."""
        known = _parameters_of(self.rule)
        return {name: parameter.default for name, parameter in known.items()} | dict(self.parameters)

    @property
    def is_kept(self) -> bool:
        """Whether what was picked matters to later calls too."""
        return self.cadence != "call"

    def __str__(self) -> str:
        given = ", ".join(f"{name} {value:g}" for name, value in self.parameters)
        often = {"call": "", "once": ", once", "shrink": ", among those of the step before"}.get(str(self.cadence), "")
        if isinstance(self.cadence, tuple):
            often = f", again at {', '.join(f'{level:g}' for level in self.cadence)}"
        return f"{self.rule}{f'({given})' if given else ''} {self.budget}{often}"


def is_due(cadence: str | tuple[float, ...], picked: float, level: float) -> bool:
    """Whether blocks that were picked at a noise level have to be picked anew at another one, which is not above it."""
    if isinstance(cadence, str):
        return cadence != "once"
    return any(level <= at < picked for at in cadence)
