"""Families: where one transformer class has its self-attention, its token grid and its text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.plan import TEXT_POSITIONS, Architecture

__all__ = [
    "Family",
    "UnknownGridError",
    "UnsupportedModelError",
    "architecture_of",
    "family_of",
    "find_transformers",
    "layers_of",
    "register_family",
]


class UnsupportedModelError(ValueError):
    """The model has no transformer that a family describes."""


class UnknownGridError(ValueError):
    """The arguments of a forward do not tell its token grid; the message says why."""


def _heads(config: Any) -> int:
    return int(config.num_attention_heads)


def _head_dim(config: Any) -> int:
    return int(config.attention_head_dim)


@dataclass(frozen=True)
class Family:
    """An adapter for one or a few transformer classes.

    name: what messages call it.
    classes: names of transformer classes; subclasses belong to them too.
    layers: paths of the self-attention modules, with ``*`` for a number: ``blocks.*.attn1``.
    grid: ``(config, arguments) -> TokenGrid`` from the model's configuration and the forward's arguments by name;
        raises :class:`UnknownGridError` where it cannot tell.
    patch_size: ``config -> (t, h, w)``, latent pixels per token.
    text_position: ``none``, ``before`` or ``after``: where text tokens stand in the self-attention sequence.
    timestep_scale: the unit of the forward's ``timestep``: ``train`` (0 to num_train_timesteps) or ``unit`` (0 to 1).
    heads, head_dim: from the configuration.
    """

    name: str
    classes: tuple[str, ...]
    layers: tuple[str, ...]
    grid: Callable[[Any, Mapping[str, Any]], TokenGrid]
    patch_size: Callable[[Any], tuple[int, int, int]]
    text_position: str = "none"
    timestep_scale: str = "train"
    heads: Callable[[Any], int] = _heads
    head_dim: Callable[[Any], int] = _head_dim

    def __post_init__(self) -> None:
        if not self.classes or not self.layers:
            raise ValueError(f"family {self.name!r} needs at least one class and one layer path")
        if self.text_position not in TEXT_POSITIONS:
            raise ValueError(f"text_position must be one of {', '.join(TEXT_POSITIONS)}; got {self.text_position!r}")
        if self.timestep_scale not in ("train", "unit"):
            raise ValueError(f"timestep_scale must be 'train' or 'unit'; got {self.timestep_scale!r}")


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family, *, replace: bool = False) -> None:
    """Make transformers of the family's classes known. A class that has a family raises unless ``replace``."""
    if not isinstance(family, Family):
        raise TypeError(f"register_family takes a diffsparse.pipelines.Family, got {type(family).__name__}")
    taken = [name for name in family.classes if name in _FAMILIES]
    if taken and not replace:
        raise ValueError(f"{', '.join(taken)} already has a family; pass replace=True to replace it")
    _FAMILIES.update(dict.fromkeys(family.classes, family))


def known_classes() -> tuple[str, ...]:
    """Names of the transformer classes that have a family."""
    return tuple(_FAMILIES)


def _lookup(transformer: torch.nn.Module) -> tuple[str, Family] | None:
    for cls in type(transformer).__mro__:
        if cls.__name__ in _FAMILIES:
            return cls.__name__, _FAMILIES[cls.__name__]
    return None


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what}; known transformers: {', '.join(sorted(_FAMILIES))}. "
        "Describe another one with diffsparse.register_family(diffsparse.pipelines.Family(...))"
    )


def family_of(transformer: torch.nn.Module) -> Family:
    """The family of a transformer. Raises :class:`UnsupportedModelError` where there is none."""
    found = _lookup(transformer)
    if found is None:
        raise _unsupported(f"{type(transformer).__name__} has no family")
    return found[1]


def family_by_class(name: str) -> Family:
    """The family of a transformer class. Raises :class:`UnsupportedModelError` where there is none."""
    if name not in _FAMILIES:
        raise _unsupported(f"{name} has no family")
    return _FAMILIES[name]


def layers_of(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The self-attention modules by path, in the order of the model."""
    family = family_of(transformer)
    paths = [re.compile(re.escape(path).replace(r"\*", r"\d+")) for path in family.layers]
    layers = {name: m for name, m in transformer.named_modules() if any(p.fullmatch(name) for p in paths)}
    if not layers:
        raise UnsupportedModelError(
            f"{type(transformer).__name__} has no module at {' or '.join(family.layers)}, where its family "
            f"{family.name!r} has its self-attention"
        )
    return layers


def architecture_of(transformer: torch.nn.Module) -> Architecture:
    """What a plan must share with this transformer. Raises :class:`UnsupportedModelError` for an unknown class."""
    transformer = unwrap(transformer)
    family = family_of(transformer)
    found = _lookup(transformer)
    assert found is not None
    config = transformer.config
    return Architecture(
        model_class=found[0],
        layers=tuple(layers_of(transformer)),
        heads=family.heads(config),
        head_dim=family.head_dim(config),
        patch_size=family.patch_size(config),
        text_position=family.text_position,
    )


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside a ``torch.compile`` wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def find_transformers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The denoising transformers of a pipeline by component name; a bare transformer is called ``transformer``.

    Raises :class:`UnsupportedModelError` where there is none, or one without a family.
    """
    if isinstance(pipe, torch.nn.Module):
        module = unwrap(pipe)
        family_of(module)
        return {"transformer": module}
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(f"expected a diffusers pipeline or a transformer, got {type(pipe).__name__}")
    modules = {name: unwrap(m) for name, m in components.items() if isinstance(m, torch.nn.Module)}
    found: dict[str, torch.nn.Module] = {}
    for name, module in modules.items():
        if _lookup(module) is not None and not any(module is other for other in found.values()):
            found[name] = module
    if not found:
        others = [type(m).__name__ for name, m in modules.items() if "transformer" in name or name == "unet"]
        what = f"its {' and '.join(others)} has no family" if others else "it has no transformer"
        raise _unsupported(f"{type(pipe).__name__} cannot run sparse attention: {what}")
    return found
