"""What a plan must share with a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

__all__ = ["TEXT_POSITIONS", "Architecture"]

TEXT_POSITIONS = ("none", "before", "after")


@dataclass(frozen=True)
class Architecture:
    """What a plan must share with a model to run on it.

    ``layers``: paths of the self-attention modules, in order. ``patch_size``: ``(t, h, w)`` latent pixels per token.
    ``text_position``: where text tokens stand in the sequence: ``none``, ``before`` or ``after`` the visual ones.
    """

    model_class: str
    layers: tuple[str, ...]
    heads: int
    head_dim: int
    patch_size: tuple[int, int, int]
    text_position: str = "none"

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that are equal for equal architectures, on every platform."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Architecture) -> list[str]:
        """What differs, one readable line each; empty where the two are equal."""
        lines = []
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if mine == theirs:
                continue
            if f.name == "layers":
                lacking = [n for n in mine if n not in theirs]
                lines.append(
                    f"layers: the plan has {len(mine)}, the model {len(theirs)}"
                    + (
                        f" (the model lacks {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''})"
                        if lacking
                        else ""
                    )
                )
            else:
                lines.append(f"{f.name}: the plan has {mine!r}, the model {theirs!r}")
        return lines
