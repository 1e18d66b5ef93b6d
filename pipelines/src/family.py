"""Families: where one transformer class has its self-attention, its token grid and its text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffsparse.architecture import TEXT_POSITIONS, Architecture
from diffsparse.grid import TokenGrid

TIMESTEP_SCALES = ("train", "unit", "unit_rising")

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
    text_from_call: the number of text tokens is whatever a call has beside the visual ones, not what ``grid`` says
        (models that cut padding off inside).
    visual_only: paths among ``layers`` whose sequences hold no text although the model's other layers' do.
    layer_grid: ``(config, layer, grid) -> TokenGrid``, what one layer sees, from its path and the forward's grid, where
        layers differ in more than that.
    timestep: name of the forward's argument that tells the noise level.
    timestep_scale: its unit: ``train`` (noise is 1 at num_train_timesteps), ``unit`` (at 1), ``unit_rising`` (at 0, and
        the clip is clean at 1), or a function ``(value, scheduler or None) -> noise level``.
    heads, head_dim: from the configuration.
    stays_dense: for the table of supported models: what of the self-attention a plan does not reach, and when.
    stand_in: for models whose attention processors build a mask of all pairs of tokens: ``processor -> processor``, the
        one that a layer gets while hooks are attached instead of its own, or None to leave that one. It is a
        ``_diffusers.StandIn`` around its own, and calls attention with a key-padding mask in the place of a full one
        where :func:`diffsparse.pipelines.patch.takes_key_mask` says so.
    """

    name: str
    classes: tuple[str, ...]
    layers: tuple[str, ...]
    grid: Callable[[Any, Mapping[str, Any]], TokenGrid]
    patch_size: Callable[[Any], tuple[int, int, int]]
    text_position: str = "none"
    text_from_call: bool = False
    visual_only: tuple[str, ...] = ()
    layer_grid: Callable[[Any, str, TokenGrid], TokenGrid] | None = None
    timestep: str = "timestep"
    timestep_scale: str | Callable[[float, Any], float] = "train"
    heads: Callable[[Any], int] = _heads
    head_dim: Callable[[Any], int] = _head_dim
    stays_dense: str = ""
    stand_in: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if not self.classes or not self.layers:
            raise ValueError(f"family {self.name!r} needs at least one class and one layer path")
        if self.text_position not in TEXT_POSITIONS:
            raise ValueError(f"text_position must be one of {', '.join(TEXT_POSITIONS)}; got {self.text_position!r}")
        if unknown := [path for path in self.visual_only if path not in self.layers]:
            raise ValueError(f"visual_only names {', '.join(unknown)}, but no such layer is listed")
        if not callable(self.timestep_scale) and self.timestep_scale not in TIMESTEP_SCALES:
            raise ValueError(
                f"timestep_scale must be a function or one of {', '.join(TIMESTEP_SCALES)}; got {self.timestep_scale!r}"
            )

    def noise_level(self, value: float, num_train_timesteps: int, scheduler: Any = None) -> float:
        """The noise level that a value of ``timestep`` means, clipped to [0, 1]."""
        if callable(self.timestep_scale):
            value = self.timestep_scale(value, scheduler)
        elif self.timestep_scale == "train":
            value /= num_train_timesteps
        elif self.timestep_scale == "unit_rising":
            value = 1.0 - value
        return min(1.0, max(0.0, value))

    def is_visual_only(self, layer: str) -> bool:
        """Whether the sequences of this layer, a module's path, hold no text."""
        return any(path.fullmatch(layer) for path in _patterns(self.visual_only))


_FAMILIES: dict[str, Family] = {}
_UNSUITABLE: dict[str, str] = {}


def _patterns(paths: tuple[str, ...]) -> list[re.Pattern[str]]:
    return [re.compile(re.escape(path).replace(r"\*", r"\d+")) for path in paths]


def register_family(family: Family, *, replace: bool = False) -> None:
    """Make transformers of the family's classes known. A class that has a family raises unless ``replace``."""
    if not isinstance(family, Family):
        raise TypeError(f"register_family takes a diffsparse.pipelines.Family, got {type(family).__name__}")
    taken = [name for name in family.classes if name in _FAMILIES]
    if taken and not replace:
        raise ValueError(f"{', '.join(taken)} already has a family; pass replace=True to replace it")
    _FAMILIES.update(dict.fromkeys(family.classes, family))


def register_unsuitable(reasons: Mapping[str, str]) -> None:
    """Transformer classes for which there cannot be a family, with the reason, which users get to read."""
    _UNSUITABLE.update(reasons)


def known_classes() -> tuple[str, ...]:
    """Names of the transformer classes that have a family."""
    return tuple(_FAMILIES)


def _lookup(transformer: torch.nn.Module) -> tuple[str, Family] | None:
    for cls in type(transformer).__mro__:
        if cls.__name__ in _FAMILIES:
            return cls.__name__, _FAMILIES[cls.__name__]
    return None


def _why_none(transformer: torch.nn.Module) -> str:
    name = type(transformer).__name__
    reason = next((_UNSUITABLE[c.__name__] for c in type(transformer).__mro__ if c.__name__ in _UNSUITABLE), None)
    return f"{name} has no family" if reason is None else f"{name} is not suited: {reason}"


def _unsupported(what: str) -> UnsupportedModelError:
    """The error; where the matter is not settled by a reason, with what can be done."""
    if "is not suited" not in what:
        what += (
            f". `diffsparse models` lists the {len(_FAMILIES)} transformers that can run; describe another one with "
            "diffsparse.register_family(diffsparse.pipelines.Family(...))"
        )
    return UnsupportedModelError(what)


def family_of(transformer: torch.nn.Module) -> Family:
    """The family of a transformer. Raises :class:`UnsupportedModelError` where there is none."""
    found = _lookup(transformer)
    if found is None:
        raise _unsupported(_why_none(transformer))
    return found[1]


def family_by_class(name: str) -> Family:
    """The family of a transformer class. Raises :class:`UnsupportedModelError` where there is none."""
    if name not in _FAMILIES:
        raise _unsupported(f"{name} has no family")
    return _FAMILIES[name]


def layers_of(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The self-attention modules by path, in the order of the model."""
    family = family_of(transformer)
    paths = _patterns(family.layers)
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
    """The model inside wrappers that call it as a module (``torch.compile``, PEFT, DDP), or the module itself."""
    while _lookup(module) is None:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            inner = module.module
        elif callable(base := getattr(module, "get_base_model", None)):
            inner = base()
        else:
            inner = getattr(module, "_orig_mod", None)
        if not isinstance(inner, torch.nn.Module) or inner is module:
            return module
        module = inner
    return module


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
        others = [_why_none(m) for name, m in modules.items() if "transformer" in name or name == "unet"]
        missing = [name for name, component in components.items() if "transformer" in name and component is None]
        refusal = f"{type(pipe).__name__} cannot run sparse attention: "
        if missing and not others:
            raise UnsupportedModelError(
                f"{refusal}its {' and its '.join(missing)} {'is' if len(missing) == 1 else 'are'} None; load the "
                "pipeline with its transformer, or pass the transformer itself"
            )
        raise _unsupported(refusal + (f"its {' and its '.join(others)}" if others else "it has no transformer"))
    return found
