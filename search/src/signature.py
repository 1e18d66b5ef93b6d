"""What a pipeline's call takes, needs and sets by itself: read from its signature, without running it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from diffsparse.search.errors import BadInput
from diffsparse.search.modular import is_modular, modular_parameters

__all__ = [
    "PLAIN",
    "RESERVED",
    "SHORTENING",
    "check_generates",
    "default_of",
    "inputs_beside_prompt",
    "makes_videos",
    "parameters",
    "takes_files",
]

#: The arguments of an input that is a prompt and nothing else.
PLAIN = ("prompt",)

#: Arguments of which a part of the steps depends: of those that are asked for, only this share runs.
SHORTENING = ("strength", "denoise_strength")

#: Arguments that are no part of an input, with what sets them.
RESERVED = {
    "num_inference_steps": "it is the same for all inputs: --steps, or num_inference_steps=",
    "guidance_scale": "it is the same for all inputs: --guidance-scale, or guidance_scale=",
    "true_cfg_scale": "it is the same for all inputs: --true-cfg-scale, or true_cfg_scale=",
    "height": "it is the same for all inputs: --height, or height=",
    "width": "it is the same for all inputs: --width, or width=",
    "num_frames": "it is the same for all inputs: --num-frames, or num_frames=",
    "generator": "the noise comes from the seed",
    "latents": "the noise comes from the seed",
    "output_type": "it is set by the search and the evaluation",
    "return_dict": "it is set by the search and the evaluation",
    "callback_on_step_end": "it is set by the search and the evaluation",
    "callback_on_step_end_tensor_inputs": "it is set by the search and the evaluation",
    "num_images_per_prompt": "each input makes one image",
    "num_videos_per_prompt": "each input makes one clip",
    "timesteps": "the steps are the scheduler's own",
    "sigmas": "the steps are the scheduler's own",
}

#: Arguments of a call that stand for a picture, a clip or another condition, by the words of their names.
CONDITIONS = ("image", "images", "video", "mask", "control", "controls", "conditions", "class_labels", "keyframes")
#: Words of arguments whose text is the path of a file, a picture or a clip.
FILES = ("image", "images", "video", "videos", "mask", "control", "controls", "keyframes")
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
    if is_modular(pipe):
        return modular_parameters(pipe)
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


def takes_files(argument: str) -> bool:
    """Whether an argument's text is the path of a picture or a clip, by diffusers' usual names."""
    words = argument.split("_")
    if not any(word in FILES for word in words) or argument.startswith("num_"):
        return False
    return not any(word in ("embeds", "latents", "attention", "prompt", "mode", "id", "ids", "scale") for word in words)


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


def check_generates(pipe: Any, given: Collection[str] = PLAIN) -> None:
    """Raises :class:`BadInput` where this pipeline cannot generate from an input with these arguments.

    With what it needs or does not take. ``given``: a prompt and nothing else, unless it says more.
    """
    name, known = type(pipe).__name__, parameters(pipe)
    lacking = [argument for argument in _needed(known) if argument not in given]
    alone = not set(given) - set(PLAIN)
    if "prompt" in given and "prompt" not in known:
        takes = ", ".join(lacking or inputs_beside_prompt(pipe)) or "other arguments"
        raise BadInput(f"{name} takes no prompt (its call takes {takes}); {_instead(known)}")
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for argument in given:
        if argument not in known and not any_name:
            raise BadInput(f"{name} takes no {argument}; {_similar(argument, pipe)}")
    if lacking:
        example = ", ".join(f'"{argument}": "FILE"' for argument in lacking)
        raise BadInput(
            f"{name} cannot generate from {'a prompt alone' if alone else ', '.join(sorted(given))}: its call needs "
            f'{", ".join(lacking)}; give inputs as JSON lines, {{"prompt": "...", {example}}}'
            + (f", or {_instead(known)}" if alone else "")
        )
    _check_transformers(pipe)


def _similar(argument: str, pipe: Any) -> str:
    """What to write in the place of an argument that a pipeline does not take."""
    known = [n for n in parameters(pipe) if n not in RESERVED]
    if near := difflib.get_close_matches(argument, known, 1):
        return f"did you mean {near[0]}?"
    return f"its call takes {', '.join(['prompt', *inputs_beside_prompt(pipe)])}"


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
