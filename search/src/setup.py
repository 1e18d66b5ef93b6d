"""How a pipeline is set up once it is loaded: LoRA weights, another scheduler, offloading, weights in 8 bits."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffsparse.pipelines import find_transformers
from diffsparse.search.columns import printable, shorten
from diffsparse.search.errors import BadInput

__all__ = ["OFFLOADS", "QUANTIZATIONS", "Lora", "Setup"]

OFFLOADS = ("none", "model", "group")
QUANTIZATIONS = ("none", "int8")


@dataclass(frozen=True)
class Lora:
    """A file of LoRA weights, and the factor that they count with."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """From ``FILE`` or ``FILE:weight``. Raises :class:`BadInput` where there is no such file."""
        name, colon, last = text.rpartition(":")
        path, weight = Path(text), 1.0
        if colon and not path.is_file():
            try:
                path, weight = Path(name), float(last)
            except ValueError:
                raise BadInput(f"--lora {text}: the weight after the colon is a number, as 0.8, got {last!r}") from None
        if not path.is_file():
            raise BadInput(f"--lora {text}: no file at {str(path)!r}; give a .safetensors file, or FILE:weight")
        if not math.isfinite(weight):
            raise BadInput(f"--lora {text}: the weight is a number, as 0.8, got {last!r}")
        return cls(path, weight)


@dataclass(frozen=True)
class Setup:
    """What the options of a command say. ``scheduler``: a class of diffusers, None for the model's own."""

    loras: tuple[Lora, ...] = ()
    scheduler: str | None = None
    offload: str = "none"
    quantize: str = "none"

    @classmethod
    def parse(
        cls, loras: Sequence[str] = (), scheduler: str | None = None, offload: str = "none", quantize: str = "none"
    ) -> Setup:
        """From the options, checked before anything is loaded. Raises :class:`BadInput`."""
        for option, value, known in (("--offload", offload, OFFLOADS), ("--quantize", quantize, QUANTIZATIONS)):
            if value not in known:
                raise BadInput(f"{option} {printable(shorten(value, 60))}: use one of {', '.join(known)}")
        if quantize == "int8":
            _torchao()
        if loras:
            try:
                import peft  # noqa: F401
            except ImportError:
                raise BadInput(f"--lora {loras[0]}: needs the package peft: pip install peft") from None
        found = tuple(Lora.parse(text) for text in loras)
        return cls(found, None if scheduler is None else _scheduler_name(scheduler), offload, quantize)

    @property
    def about(self) -> dict[str, Any]:
        """What differs from the model as it is, as JSON values for a plan's record; files by name and content."""
        found: dict[str, Any] = {}
        if self.loras:
            found["lora"] = [
                {
                    "file": lora.path.name,
                    "weight": lora.weight,
                    "sha256": hashlib.sha256(lora.path.read_bytes()).hexdigest(),
                }
                for lora in self.loras
            ]
        if self.scheduler is not None:
            found["scheduler"] = self.scheduler
        return found | {name: value for name in ("offload", "quantize") if (value := getattr(self, name)) != "none"}

    def differs(self, record: Mapping[str, Any]) -> str | None:
        """A line where a plan was searched with the model set up in another way; None where it was not."""
        model = record.get("model")
        if not isinstance(model, Mapping) or "pipeline" not in model:
            return None  # it was not searched
        # Where models are kept while they are not needed does not change what they compute.
        names = [n for n in ("lora", "scheduler", "quantize") if model.get(n) != self.about.get(n)]
        if not names:
            return None
        return f"the plan was searched with another {' and another '.join(names)} than it is evaluated with"

    def apply(self, pipe: Any, device: torch.device) -> None:
        """Set a pipeline up that was loaded on the CPU, and put it on the device. Raises :class:`BadInput`."""
        if self.scheduler is not None:
            pipe.scheduler = _scheduler_for(pipe, self.scheduler)
        if self.loras:
            self._load_loras(pipe)
        if self.quantize == "int8":
            _to_int8(pipe)
        if self.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif self.offload == "group":
            pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
        else:
            pipe.to(device)

    def _load_loras(self, pipe: Any) -> None:
        if not hasattr(pipe, "load_lora_weights"):
            raise BadInput(f"{type(pipe).__name__} takes no LoRA weights; leave --lora out")
        names = [f"lora_{i}" for i in range(len(self.loras))]
        for name, lora in zip(names, self.loras, strict=True):
            try:
                pipe.load_lora_weights(str(lora.path), adapter_name=name)
            except Exception as error:  # of diffusers, peft, safetensors or torch: whatever is wrong with the file
                raise BadInput(
                    f"--lora {lora.path}: {type(pipe).__name__} cannot load it: {printable(shorten(str(error), 200))}"
                ) from error
            if not any(name in found for found in pipe.get_list_adapters().values()):
                raise BadInput(f"--lora {lora.path}: it holds no weights for this {type(pipe).__name__}")
        pipe.set_adapters(names, [lora.weight for lora in self.loras])


# -- schedulers --------------------------------------------------------------------------------------------------------


def _schedulers() -> dict[str, type]:
    """Diffusers' schedulers, by class name."""
    import diffusers

    return {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}


def _short(name: str) -> str:
    name = name.lower()
    for ending in ("scheduler", "multistep", "discrete"):
        name = name.removesuffix(ending)
    return name


def _scheduler_name(name: str) -> str:
    """The class that is meant: its name, or what it has before ``MultistepScheduler`` or ``DiscreteScheduler``."""
    known = list(_schedulers())
    if name in known:
        return name
    meant = [other for other in known if _short(other) == _short(name)]
    if len(meant) == 1:
        return meant[0]
    near = difflib.get_close_matches(name, known, 3, 0.5) or ["UniPCMultistepScheduler", "EulerDiscreteScheduler"]
    raise BadInput(f"--scheduler {printable(shorten(name, 60))}: diffusers has none of this name; {' or '.join(near)}?")


def _scheduler_for(pipe: Any, name: str) -> Any:
    """A scheduler with the settings of the pipeline's own, as far as it has them too."""
    cls: Any = _schedulers()[name]
    own = pipe.scheduler.config
    takes = inspect.signature(cls.__init__).parameters
    matches = _by_flow(type(pipe.scheduler).__name__, own)
    more: dict[str, Any] = {}
    if matches and "use_flow_sigmas" in takes:
        more = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        if (shift := own.get("shift", own.get("flow_shift"))) is not None:
            more["flow_shift"] = shift
    elif matches and name.startswith("FlowMatch"):
        if (shift := own.get("flow_shift")) is not None:
            more["shift"] = shift
    elif matches or name.startswith("FlowMatch"):
        kind = "flow matching" if matches else "no flow matching"
        fitting = "FlowMatchEuler or UniPC" if matches else "DPMSolver or UniPC"
        raise BadInput(f"--scheduler {name}: this model is of {kind}, which it does not do; use {fitting}")
    return cls.from_config(own, **more)


def _by_flow(name: str, config: Any) -> bool:
    return name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))


# -- weights in 8 bits -------------------------------------------------------------------------------------------------


def _torchao() -> Any:
    for name in ("torchao", "torch.utils._pytree"):  # of its kernels for GPUs that are not here
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from torchao import quantization
    except ImportError as error:
        raise BadInput(
            f"--quantize int8: needs the package torchao ({printable(shorten(str(error), 100))}): pip install torchao"
        ) from None
    return quantization


def _to_int8(pipe: Any) -> None:
    """The weights of all linear layers of the transformers in 8 bits; those of LoRA stay as they are."""
    torchao = _torchao()

    def wanted(module: torch.nn.Module, path: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "lora_" not in path

    for transformer in find_transformers(pipe).values():
        torchao.quantize_(transformer, torchao.Int8WeightOnlyConfig(), filter_fn=wanted)
