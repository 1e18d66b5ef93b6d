"""What composing a plan takes from the pipeline, as JSON values: with them a plan is made without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffsparse.plan import Architecture
from diffsparse.search.config import SearchConfig

__all__ = ["Facts"]


@dataclass(frozen=True)
class Facts:
    """Of the model and of the machine that a search ran on.

    ``config``: of the last search that used the record. ``num_prompts``: how many inputs it was given. ``switch``: the
    noise level below which another expert runs, or None. ``model``, ``inputs``, ``environment``: as a plan's record has
    them. ``size``: height and width in pixels that no option gave.
    """

    architecture: Architecture
    config: SearchConfig
    num_prompts: int
    switch: float | None
    model: Mapping[str, Any]
    inputs: Mapping[str, Any]
    size: Mapping[str, int]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "architecture": asdict(self.architecture),
            "config": asdict(self.config),
            "num_prompts": self.num_prompts,
            "switch": self.switch,
            "model": dict(self.model),
            "inputs": dict(self.inputs),
            "size": dict(self.size),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Facts:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for what is not such a dictionary."""
        architecture = dict(data["architecture"])
        architecture |= {"layers": tuple(architecture["layers"]), "patch_size": tuple(architecture["patch_size"])}
        own = {"architecture": Architecture(**architecture), "config": SearchConfig(**data["config"])}
        return cls(**{**data, **own})
