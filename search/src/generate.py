"""Generating clips with a fixed seed each, and timing the denoising loop alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from diffsparse.search.call import call_pipeline, denoisers
from diffsparse.search.columns import shorten
from diffsparse.search.errors import BadInput
from diffsparse.search.inputs import GenerationInput, Input, as_input, as_inputs
from diffsparse.search.signature import PLAIN, check_generates, default_of, parameters

__all__ = [
    "MAX_SEED",
    "Clip",
    "GenerationSettings",
    "LoopTimer",
    "check_seeds",
    "denoisers",
    "generate_clip",
    "generate_clips",
]

#: The largest seed: torch's generators take 64 bits, and a few seeds after the first one are used too.
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class GenerationSettings:
    """What every clip of a comparison has in common. Sizes are in pixels; None leaves the pipeline's own value.

    ``true_cfg_scale``: classifier-free guidance of pipelines whose ``guidance_scale`` is something else (Flux,
    Qwen-Image): away from ``negative_prompt``, or from no prompt where there is none.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float | None = None

    def __post_init__(self) -> None:
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise BadInput(f"the number of steps must be at least 1, got {self.num_inference_steps}")

    def arguments(self, pipe: Any, given: Collection[str] = PLAIN) -> dict[str, Any]:
        """Keyword arguments for this pipeline's call, beside those that an input gives: ``given``.

        Raises :class:`BadInput` for one that it does not take, and where it needs more than all of them.
        """
        check_generates(pipe, given)
        wanted = {name: value for name, value in asdict(self).items() if value is not None}
        if "negative_prompt" in wanted and "negative_prompt" in given:
            raise BadInput("a negative_prompt is given for all inputs, and one of them has its own; leave one out")
        if self.true_cfg_scale is not None and self.true_cfg_scale > 1 and "negative_prompt" not in given:
            wanted.setdefault("negative_prompt", "")  # without one these pipelines do not guide at all
        if unknown := sorted(set(wanted) - set(parameters(pipe))):
            raise BadInput(f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")
        return wanted

    def resolved(self, pipe: Any) -> GenerationSettings:
        """The same with the pipeline's own values where this has None and its call has a default.

        ``true_cfg_scale`` stays as it is: its default guides only together with a negative prompt.
        """
        names = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames")
        return replace(self, **{n: default_of(pipe, n) for n in names if getattr(self, n) is None})

    def brief(self, pipe: Any, steps: int) -> GenerationSettings:
        """The same with ``steps`` steps, where the pipeline's call takes a number of them."""
        return replace(self, num_inference_steps=steps) if "num_inference_steps" in parameters(pipe) else self


@dataclass(frozen=True, eq=False)
class Clip:
    """One generated clip.

    ``prompt``: the name of its input. ``frames``: float32 ``[frames, channels, height, width]`` in [0, 1], on the CPU.
    An image is a clip of one frame. ``noise_levels``: ``timestep / num_train_timesteps`` of every step that ran.
    ``loop_seconds``: from the start of the first denoiser call to the end of the last one.
    ``seconds``: the whole call, text encoding and decoding included.
    """

    prompt: str
    seed: int
    frames: torch.Tensor
    noise_levels: tuple[float, ...]
    loop_seconds: float
    seconds: float
    source: Input | None = None

    @property
    def made_from(self) -> GenerationInput:
        """What it was generated from."""
        return self.prompt if self.source is None else self.source


class LoopTimer:
    """Time from the start of the first call of any of the modules to the end of the last one.

    On CUDA by events in the stream, so that measuring makes nothing wait.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self._modules = modules
        self._start: Any = None
        self._end: Any = None

    def _now(self, device: torch.device) -> Any:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            return event
        return time.perf_counter()

    @staticmethod
    def _device(args: Any, kwargs: Any, module: torch.nn.Module) -> torch.device:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        return tensors[0].device if tensors else next(module.parameters()).device

    def _before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._start is None:
            self._start = self._now(self._device(args, kwargs, module))

    def _after(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._end = self._now(self._device(args, kwargs, module))

    @contextmanager
    def running(self) -> Iterator[LoopTimer]:
        handles = []
        for module in self._modules:
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @property
    def seconds(self) -> float:
        """What was measured; 0 where no module was called."""
        if self._start is None or self._end is None:
            return 0.0
        if isinstance(self._end, float):
            return self._end - self._start  # type: ignore[no-any-return]
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000  # type: ignore[no-any-return]


def _frames(output: Any) -> torch.Tensor:
    frames = output.frames if hasattr(output, "frames") else output.images
    clip = frames[0]
    if clip.ndim == 3:
        clip = clip[None]
    return clip.detach().to("cpu", torch.float32)  # type: ignore[no-any-return]


def _noise_levels(pipe: Any) -> tuple[float, ...]:
    scheduler = pipe.scheduler
    # Where a given picture or clip is changed only in part, the pipeline leaves the first steps out. Some tell the
    # scheduler so, and others keep the number of those that are left.
    every = len(scheduler.timesteps)
    left = min(every - (getattr(scheduler, "begin_index", None) or 0), getattr(pipe, "num_timesteps", None) or every)
    ran = scheduler.timesteps[every - left :]
    return tuple((ran.double() / scheduler.config.num_train_timesteps).clamp(0, 1).tolist())


def generate_clip(
    pipe: Any,
    prompt: GenerationInput,
    seed: int,
    settings: GenerationSettings,
    *,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> Clip:
    """One clip of a prompt or other input.

    The noise comes from a generator on the CPU, so a seed means the same noise on every device.

    ``on_step`` gets every step's index and latents when it has ended; what it raises ends the generation.
    """
    source = as_input(prompt)
    more: dict[str, Any] = {}
    if on_step is not None:
        if "callback_on_step_end" not in parameters(pipe):
            raise BadInput(f"{type(pipe).__name__} cannot be watched step by step: it takes no callback_on_step_end")

        def callback(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step, tensors["latents"])
            return tensors

        more["callback_on_step_end"] = callback
    timer = LoopTimer(denoisers(pipe))
    start = time.perf_counter()
    with timer.running():
        output = call_pipeline(pipe, source, seed, settings, "pt", **more)
    frames = _frames(output)  # waits for the device
    seconds = time.perf_counter() - start
    return Clip(source.name, seed, frames, _noise_levels(pipe), timer.seconds, seconds, source)


def check_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """The seeds as a tuple. Raises :class:`BadInput` where one is out of range, stands twice, or none is given."""
    checked = tuple(seeds)
    if not checked or min(checked) < 0 or max(checked) > MAX_SEED or len(set(checked)) != len(checked):
        raise BadInput(f"seeds must be distinct integers from 0 to {MAX_SEED}, got {shorten(str(list(checked)), 100)}")
    return checked


def generate_clips(
    pipe: Any,
    prompts: Sequence[GenerationInput],
    seeds: Sequence[int],
    settings: GenerationSettings,
    *,
    label: str = "generate",
    progress: bool = True,
) -> list[Clip]:
    """Every prompt or other input with every seed, inputs outermost, one clip at a time.

    ``progress`` shows a bar on stderr.
    """
    from tqdm import tqdm

    jobs = [(prompt, seed) for prompt in as_inputs(prompts) for seed in check_seeds(seeds)]
    with tqdm(jobs, desc=label, unit="clip", disable=not progress, leave=False) as bar:
        return [generate_clip(pipe, prompt, seed, settings) for prompt, seed in bar]
