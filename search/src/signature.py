"""What a pipeline's call takes, needs and sets by itself: read from its signature, without running it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffsparse.search.errors import BadInput

__all__ = ["check_generates", "default_of", "inputs_beside_prompt", "makes_videos", "parameters"]

#: Arguments of a call that stand for a picture, a clip or another condition, by the words of their names.
CONDITIONS = ("image", "images", "video", "mask", "control", "controls", "conditions", "class_labels", "keyframes")
#: What the names of settings end in that only speak of such an input.
SETTINGS = ("_scale", "_mask", "_strength", "_embeds", "_start", "_end", "_mode", "_per_prompt", "_ids", "_sigma_min")

#: What a generation gives to every call, or can be asked to.
GIVEN = (
    "prompt",
    "generator",
    "output_type",
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
    "negative_prompt",
    "true_cfg_scale",
)


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of the pipeline's call by name, without ``self``."""
    found = dict(inspect.signature(type(pipe).__call__).parameters)
    found.pop("self", None)
    return found


def default_of(pipe: Any, name: str) -> Any:
    """The pipeline's own value of an argument; None where it has no such argument, or none by itself."""
    parameter = parameters(pipe).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def makes_videos(pipe: Any) -> bool:
    """True for a pipeline whose output is a clip of several frames."""
    known = parameters(pipe)
    return any(name in known for name in ("num_frames", "num_videos_per_prompt"))


def inputs_beside_prompt(pipe: Any) -> list[str]:
    """Arguments that take a picture, a clip or another condition, needed or not."""
    return [
        name
        for name in parameters(pipe)
        if not name.endswith(SETTINGS) and not name.startswith("num_") and any(w in name.split("_") for w in CONDITIONS)
    ]


def _needed(known: Mapping[str, inspect.Parameter]) -> list[str]:
    """Arguments without which the call cannot work, beside the prompt.

    Some have a default of None and are needed all the same: an argument ``strength`` says how much of a given picture
    or clip is changed, and one for a control net or for inpainting has nothing to do without its control or mask.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [n for n, p in known.items() if p.default is p.empty and p.kind in named and n not in GIVEN]
    if not needed and "conditions" not in known:
        # A list of conditions carries its own strengths, and may be empty.
        if "strength" in known or "mask_image" in known:
            needed = [n for n in ("image", "video", "mask_image", "mask_video") if n in known]
        needed += [n for n in ("control_image", "control_video") if n in known]
    return needed


def check_generates(pipe: Any) -> None:
    """Raises :class:`BadInput` where this pipeline cannot generate from a prompt alone, with what it needs."""
    name, known = type(pipe).__name__, parameters(pipe)
    needed = _needed(known)
    if "prompt" not in known:
        takes = ", ".join(needed or inputs_beside_prompt(pipe)) or "other arguments"
        raise BadInput(f"{name} takes no prompt (its call takes {takes}); {_instead(known)}")
    if needed:
        raise BadInput(
            f"{name} cannot generate from a prompt alone: its call needs {', '.join(needed)}, which a prompt file "
            f"cannot give; {_instead(known)}"
        )
    _check_transformers(pipe)


def _instead(known: Mapping[str, inspect.Parameter]) -> str:
    kind = "video" if "num_frames" in known or "num_videos_per_prompt" in known else "image"
    return (
        f"load the model in a text-to-{kind} pipeline and search there: a plan fits every pipeline with the same "
        "transformer"
    )


def _check_transformers(pipe: Any) -> None:
    """Is every transformer there that a generation goes through?"""
    components = getattr(pipe, "components", {})
    # A model of two experts (Wan 2.2) hands over where the noise level falls below this share.
    boundary = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    missing = []
    if "transformer" in components and components["transformer"] is None and not (boundary or 0) > 1:
        missing.append("transformer")
    if "transformer_2" in components and components["transformer_2"] is None and (boundary or 0) > 0:
        missing.append("transformer_2")
    if missing:
        raise BadInput(
            f"{type(pipe).__name__} cannot generate: its {' and its '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} None; load the pipeline with all its transformers"
        )
