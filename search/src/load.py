"""Models, prompts, plans and devices by name, with every mistake answered in one line (:class:`BadInput`)."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.codec import PlanError
from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import PRESETS
from diffsparse.saving import is_full
from diffsparse.search.columns import printable, shorten
from diffsparse.search.errors import BadInput, DiskFull
from diffsparse.search.signature import makes_videos, parameters

if TYPE_CHECKING:
    import torch

    from diffsparse.grid import TokenGrid
    from diffsparse.search.setup import Setup

__all__ = [
    "DTYPES",
    "check_backend",
    "check_model_name",
    "check_output",
    "check_plan_fits",
    "check_plan_runs",
    "check_shape",
    "choose_device",
    "choose_dtype",
    "compression",
    "load_pipeline",
    "load_plan",
    "load_shapes",
    "model_class",
    "prompts_in",
    "quiet_libraries",
    "read_prompts",
    "text_of",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# -- prompts -----------------------------------------------------------------------------------------------------------


def text_of(path: str | os.PathLike[str]) -> str:
    """The content of a file of prompts or other inputs. Raises :class:`BadInput` where there is none to read."""
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"no prompts file at {str(path)!r}; it is a text file with one prompt a line, or JSON lines")
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise BadInput(f"{str(path)!r} cannot be read: {error.strerror}") from None


def prompts_in(text: str, path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a file's text, as :func:`read_prompts` gives them."""
    # By newlines alone, whatever else Unicode calls the end of a line: a prompt may hold it.
    prompts = [line.strip() for line in text.split("\n")]
    prompts = list(dict.fromkeys(p for p in prompts if p and not p.startswith("#")))
    if not prompts:
        raise BadInput(f"{str(path)!r} holds no prompt; write one a line (lines that start with # do not count)")
    return prompts


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a file, one a line, each once; empty lines and lines that start with ``#`` do not count."""
    return prompts_in(text_of(path), path)


# -- devices -----------------------------------------------------------------------------------------------------------


def choose_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is a GPU, else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"unknown device {name!r}; use auto, cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise BadInput(f"device {name!r}: torch sees no CUDA GPU here; use --device cpu, or see `diffsparse env`")
        if (device.index or 0) >= count:
            raise BadInput(f"device {name!r}: there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    elif device.type != "cpu" and not (device.type == "mps" and torch.backends.mps.is_available()):
        raise BadInput(f"device {name!r} is not here; use auto, cpu or cuda")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on the CPU."""
    import torch

    if name not in DTYPES:
        raise BadInput(f"unknown dtype {name!r}; use one of {', '.join(DTYPES)}")
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)  # type: ignore[no-any-return]


def check_backend(name: str) -> None:
    """Raises :class:`BadInput` for a backend that is unknown, or that cannot run here, with its reason."""
    from diffsparse.kernels import available_backends

    backends = available_backends()
    if name != "auto" and name not in backends:
        raise BadInput(f"unknown backend {name!r}; use auto, {', '.join(backends)}")
    if name != "auto" and (why := backends[name]) is not None:
        raise BadInput(f"backend {name!r} cannot run here: {why}; see `diffsparse env`")


# -- models ------------------------------------------------------------------------------------------------------------


def sparse_backend(pipe: Any, plan: SparsityPlan) -> str:
    """The backend that ``"auto"`` takes for this pipeline and all tails of a plan, by name.

    Asked for by name it runs every plan sparse, also where a break-even table says that dense attention is faster and
    ``"auto"`` would leave the layers dense. That is for looking at what a plan does to the output.
    """
    import torch

    from diffsparse.kernels.checks import choose_backend
    from diffsparse.pipelines import architecture_of, find_transformers

    transformer: Any = next(iter(find_transformers(pipe).values()))
    head_dim = architecture_of(transformer).head_dim
    device = getattr(pipe, "_execution_device", pipe.device)
    return choose_backend("auto", torch.empty(1, 1, 1, head_dim, dtype=transformer.dtype, device=device), plan.tails)


def model_class(pipe: Any) -> str:
    """The class of a pipeline's transformer (of the first of two)."""
    from diffsparse.pipelines import architecture_of, find_transformers

    return architecture_of(next(iter(find_transformers(pipe).values()))).model_class


def check_model_name(model: str) -> None:
    """Is this a pipeline's folder, or can it be a Hub id? Reads no weights and asks no network."""
    folder = Path(model)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise BadInput(
                f"{model!r} is not a diffusers pipeline: it has no model_index.json; name the folder that "
                "pipe.save_pretrained wrote, or a Hub id"
            )
        try:
            content = json.loads(index.read_text("utf-8"))
        except ValueError as error:
            raise BadInput(f"{str(index)!r} is not valid JSON ({error}); fetch the model again") from None
        if not isinstance(content, dict) or "_class_name" not in content:
            raise BadInput(f"{str(index)!r} names no pipeline class (_class_name); fetch the model again")
    elif folder.exists():
        raise BadInput(f"{model!r} is a file; name a diffusers pipeline's folder or a Hub id")
    elif not HUB_ID.fullmatch(model):
        raise BadInput(
            f"no model at {model!r}: no such folder, and a Hub id has the form owner/name, "
            "for example Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )


def load_pipeline(model: str, *, device: torch.device, dtype: torch.dtype, setup: Setup | None = None) -> Any:
    """A diffusers pipeline whose transformer diffsparse knows, on ``device``, and set up. Raises :class:`BadInput`."""
    check_model_name(model)
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    from diffsparse.pipelines import find_transformers
    from diffsparse.pipelines.family import UnsupportedModelError

    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        if Path(model).is_dir():
            raise BadInput(f"{model!r} cannot be loaded: {_first_line(error)}") from error
        raise BadInput(
            f"no model at {model!r}: no such folder, and not on the Hub or not within reach ({_first_line(error)})"
        ) from error
    try:
        find_transformers(pipe)
    except UnsupportedModelError as error:
        raise BadInput(f"{model!r}: {error}") from None
    if setup is None:
        pipe.to(device)
    else:
        setup.apply(pipe, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return shorten(text.splitlines()[0], 200).rstrip(".: ") if text else type(error).__name__


@dataclass(frozen=True)
class ShapeRule:
    """What sizes a pipeline takes: multiples of ``height`` and ``width``, frames ``frames * k + 1``."""

    height: int
    width: int
    frames: int | None


def shape_rule(pipe: Any) -> ShapeRule:
    """From the autoencoder's factors and the transformer's patches. A pipeline of images has no ``frames``."""
    from diffsparse.pipelines import architecture_of, find_transformers

    patch = architecture_of(next(iter(find_transformers(pipe).values()))).patch_size
    temporal, spatial = compression(pipe)
    height, width = spatial * patch[1], spatial * patch[2]
    if type(pipe).__name__.startswith("Wan"):  # Wan's pipelines refuse anything but multiples of 16, whatever the model
        height, width = math.lcm(height, 16), math.lcm(width, 16)
    return ShapeRule(height, width, temporal if makes_videos(pipe) else None)


def compression(pipe: Any) -> tuple[int, int]:
    """Frames and pixels of the clip for each one of the latent: ``(temporal, spatial)``."""

    def attribute(*names: str) -> int:
        return next((int(v) for n in names if (v := getattr(pipe, n, None)) is not None), 1)

    return (
        attribute("vae_scale_factor_temporal", "vae_temporal_compression_ratio"),
        attribute("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"),
    )


def load_shapes(folder: str) -> Any:
    """A pipeline as :func:`load_pipeline` gives it, of a local folder's configuration alone.

    Its transformers and its autoencoder are on the meta device, without weights, and the text encoders are missing: it
    knows sizes and layers and cannot generate. Raises :class:`BadInput`.
    """
    check_model_name(folder)
    if not Path(folder).is_dir():
        raise BadInput(f"--model-shape {folder!r}: no such folder; give a model's folder, or a transformer class")
    import diffusers
    import torch

    from diffsparse.pipelines import find_transformers
    from diffsparse.pipelines.family import UnsupportedModelError

    quiet_libraries()
    index = json.loads((Path(folder) / "model_index.json").read_text("utf-8"))
    cls = getattr(diffusers, str(index["_class_name"]), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise BadInput(f"{folder!r}: this diffusers has no pipeline {index['_class_name']!r}; update diffusers")
    parts: dict[str, Any] = {}
    options = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not (isinstance(value, list) and len(value) == 2):
            options[name] = value
            continue
        parts[name] = None
        kind: Any = getattr(diffusers, str(value[1]), None) if value[0] == "diffusers" else None
        if not hasattr(kind, "load_config"):  # of another library, or no model
            continue
        try:
            with torch.device("meta" if issubclass(kind, torch.nn.Module) else "cpu"):
                parts[name] = kind.from_config(kind.load_config(folder, subfolder=name))
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise BadInput(f"{folder!r}: the configuration of {name!r} cannot be read: {_first_line(error)}") from error
    try:
        pipe = cls(**parts, **options)
        find_transformers(pipe)
    except UnsupportedModelError as error:
        raise BadInput(f"{folder!r}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{folder!r} cannot be understood without its weights ({_first_line(error)}); give --grid T,H,W instead"
        ) from error
    return pipe


def check_shape(pipe: Any, height: int | None, width: int | None, num_frames: int | None) -> None:
    """Raises :class:`BadInput` for a size that this model cannot take, with the nearest sizes that it can."""
    rule = shape_rule(pipe)
    for name, value, unit in (("height", height, rule.height), ("width", width, rule.width)):
        if value is not None and (value < unit or value % unit):
            raise BadInput(
                f"--{name} {value}: this model takes multiples of {unit}, for example {_nearest(value, unit, 0)}"
            )
    if num_frames is None:
        return
    if rule.frames is None:
        raise BadInput(f"--num-frames {num_frames}: {type(pipe).__name__} makes images; leave it out")
    if "num_frames" not in parameters(pipe):
        raise BadInput(f"--num-frames {num_frames}: {type(pipe).__name__} takes no number of frames; leave it out")
    if num_frames < 1 or (num_frames - 1) % rule.frames:
        raise BadInput(
            f"--num-frames {num_frames}: this model takes {rule.frames}k+1 frames, for example "
            f"{_nearest(num_frames, rule.frames, 1)}"
        )


def _nearest(value: int, unit: int, offset: int) -> str:
    below = max((value - offset) // unit, 0 if offset else 1) * unit + offset
    return f"{below} or {below + unit}"


# -- plans -------------------------------------------------------------------------------------------------------------


def load_plan(name: str, model_class: str | None = None, grid: TokenGrid | None = None) -> SparsityPlan:
    """A plan's folder, a Hub repository, or a preset by name, as it runs. Raises :class:`BadInput`.

    A preset is what enabling it means for transformers of ``model_class``; without one, for calls on ``grid``.
    """
    if name in PRESETS:
        from diffsparse.pipelines.resolve import named_plan

        return named_plan(name, model_class, grid)
    path = Path(name)
    if not path.exists() and not HUB_ID.fullmatch(name):
        raise BadInput(
            f"no plan at {name!r}: it is a folder that `diffsparse search` wrote, a Hub repository owner/name, or "
            f"one of {', '.join(PRESETS)}"
        )
    try:
        return SparsityPlan.from_pretrained(name)
    except PlanError as error:
        raise BadInput(_one_line(str(error))) from error
    except (OSError, NotADirectoryError) as error:
        raise BadInput(f"the plan {name!r} cannot be read: {error.strerror or error}") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def check_plan_fits(plan: SparsityPlan, pipe: Any) -> None:
    """Raises :class:`BadInput` where the plan was made for another architecture, with what differs."""
    from diffsparse.pipelines import architecture_of, find_transformers

    for transformer in find_transformers(pipe).values():
        model = architecture_of(transformer)
        differences = plan.check_architecture(model)
        named = [] if plan.is_uniform else list(plan.layers)
        lacking = [n for n in dict.fromkeys([*named, *plan.schedule.dense_layers]) if n not in model.layers]
        if lacking and not any(d.startswith("layers:") for d in differences):
            names = printable(shorten(", ".join(lacking[:3]), 200)) + (", ..." if len(lacking) > 3 else "")
            differences.append(f"it names {names}, which the model lacks")
        if differences:
            raise BadInput(
                f"the plan is for another model: {'; '.join(differences)}. Search one for this model with "
                "`diffsparse search`, or use one of " + ", ".join(PRESETS)
            )


def check_plan_runs(plan: SparsityPlan, pipe: Any, backend: str) -> None:
    """Enables the plan and disables it again. Raises :class:`BadInput` with the reason where that is not possible."""
    from diffsparse.search.evaluate import check_plan

    check_plan_fits(plan, pipe)
    try:
        check_plan(pipe, plan, backend)
    except (PlanError, ValueError, RuntimeError) as error:
        raise BadInput(_one_line(str(error))) from error


def quiet_libraries() -> None:
    """Errors of the libraries only: our own messages are the interface."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    # Loaded by diffusers where it is installed; warns of its kernels for GPUs that are not there.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


# -- output ------------------------------------------------------------------------------------------------------------


def check_output(path: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there. Raises :class:`BadInput` where nothing can be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".diffsparse-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if is_full(error):
            raise DiskFull(path) from None
        raise BadInput(f"cannot write to {str(path)!r}: {error.strerror}; choose another --out") from None
    return folder
