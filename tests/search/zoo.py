"""Pipelines around the tiny random transformers of ``tests/pipelines/zoo_*``: diffusers' own, else stand-ins.

Text encoders need weights, so ``encode_prompt`` gives random embeddings that follow the prompt, a token more for every
word. Autoencoders are left out where the latents are all that is asked for.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.pipelines import zoo_image, zoo_joint, zoo_picture, zoo_video
from tests.pipelines.case import TEXT, Case
from tests.pipelines.models import flux, hunyuan, vace, wan_pipeline

#: 13 x 16 tokens of 16 pixels, ragged in tiles of 8.
IMAGE = {"height": 208, "width": 256}
#: 3 x 7 x 9 tokens.
VIDEO = {"height": 112, "width": 144, "num_frames": 9}


def _embed(prompt: str | None, *shape: int, words: bool = True) -> torch.Tensor:
    """Random embeddings ``[1, tokens, *shape]`` that follow the prompt. ``words``: a token more for each."""
    tokens = TEXT + (len((prompt or "").split()) if words else 0)
    return torch.randn(1, tokens, *shape, generator=torch.Generator().manual_seed(zlib.crc32((prompt or "").encode())))


def _padded(prompt: str | None, dim: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, padded to ``room`` tokens, and its mask."""
    found = _embed(prompt, dim)
    mask = (torch.arange(room) < found.shape[1])[None]
    return torch.nn.functional.pad(found, (0, 0, 0, room - found.shape[1])), mask


def _own(name: str, transformer: torch.nn.Module, encode: Callable[..., Any], **parts: Any) -> Any:
    """A pipeline of diffusers. ``encode``: from prompt and negative prompt to what its ``encode_prompt`` returns."""
    import diffusers

    cls = getattr(diffusers, name)
    signature = inspect.signature(cls.encode_prompt)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(None, *args, **kwargs).arguments
        prompt, negative = (given.get(n) for n in ("prompt", "negative_prompt"))
        return encode(*(p[0] if isinstance(p, list) else p for p in (prompt, negative)))

    needed = [p for p, x in inspect.signature(cls.__init__).parameters.items() if x.default is x.empty and p != "self"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = cls(**{**dict.fromkeys(needed), "transformer": transformer, "scheduler": scheduler, **parts})
    pipe.encode_prompt = encode_prompt
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pair(prompt: str, negative: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    return _embed(prompt, 16, words=False), _embed(negative, 16, words=False)


def _masked(prompt: str, negative: str | None) -> tuple[torch.Tensor, ...]:
    return *_padded(prompt, 16, 12), *_padded(negative, 16, 12)


def wan_experts() -> Any:
    """Wan 2.2: the first expert above a noise level of 0.8, the second one below."""
    pipe = wan_pipeline(stages=2)
    pipe.encode_prompt = lambda prompt, negative_prompt=None, **_: _pair(prompt, negative_prompt)
    return pipe


def wan_vace() -> Any:
    base = wan_pipeline()
    transformer = vace(vace_in_channels=72)
    return _own("WanVACEPipeline", transformer, _pair, vae=base.vae, scheduler=base.scheduler)


def skyreels() -> Any:
    base = wan_pipeline()
    return _own("SkyReelsV2Pipeline", zoo_video.skyreels_v2(), _pair, vae=base.vae, scheduler=base.scheduler)


def sd35() -> Any:
    """Guidance in one batch, the negative prompt first; a layer without text."""

    def encode(prompt: str, negative: str | None) -> Any:
        return *(pair := _pair(prompt, negative)), *(e[:, 0, :8] for e in pair)

    return _own("StableDiffusion3Pipeline", zoo_image.sd35_medium(), encode)


def mochi() -> Any:
    """Guidance in one batch, each item with an attention call of its own length."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    backwards = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)  # its timesteps rise
    return _own(
        "MochiPipeline", zoo_joint.mochi(), lambda *p: tuple(x[:, :9] for x in _masked(*p)), scheduler=backwards
    )


def ltx() -> Any:
    return _own("LTXPipeline", zoo_video.ltx(), _masked)


def cogvideox() -> Any:
    from diffusers import CogVideoXDDIMScheduler

    return _own("CogVideoXPipeline", zoo_joint.cogvideox2b(), _pair, scheduler=CogVideoXDDIMScheduler())


def auraflow() -> Any:
    return _own("AuraFlowPipeline", zoo_image.auraflow(), _masked)


def qwenimage() -> Any:
    """True guidance in two calls, whose prompts differ in length."""
    return _own("QwenImagePipeline", zoo_image.qwenimage(), lambda p, _: (_embed(p, 16), None))


def lumina2() -> Any:
    """Guidance in two calls, whose captions differ in length; a refiner without text."""
    return _own("Lumina2Pipeline", zoo_picture.lumina2(), _masked)


def z_image() -> Any:
    """Guidance in one batch; a refiner that sees the image and its padding alone."""

    def encode(prompt: str, negative: str | None) -> Any:
        return [_embed(prompt, 16)[0]], [_embed(negative, 16)[0]]

    return _own("ZImagePipeline", zoo_picture.z_image(), encode)


def fibo2() -> Any:
    """Guidance in two calls; a refiner without text."""
    encode = lambda prompt, _: (torch.stack([_embed(prompt, 16)] * 2, 1), None)  # noqa: E731
    return _own("BriaFibo2Pipeline", zoo_image.bria_fibo2(), encode)


def flux_image() -> Any:
    """Distilled guidance: one call a step."""

    def encode(prompt: str, _: str | None) -> Any:
        found = _embed(prompt, 16)
        return found, found[:, 0, :8], torch.zeros(found.shape[1], 3)

    return _own("FluxPipeline", flux(), encode)


def chroma() -> Any:
    """With a mask that is added to the logits of all pairs of tokens."""

    def encode(prompt: str, negative: str | None) -> Any:
        found = []
        for each in (prompt, negative):
            embeddings, mask = _padded(each, 16, 12)
            found += [embeddings, torch.zeros(12, 3), mask.float()]
        return tuple(found)

    return _own("ChromaPipeline", zoo_image.chroma(), encode)


def helios() -> Any:
    return _own("HeliosPipeline", zoo_video.helios(), _pair, vae=wan_pipeline().vae)


def hunyuan_video() -> Any:
    def encode(prompt: str, _: str | None) -> Any:
        found, mask = _padded(prompt, 16, 12)
        return found, found[:, 0, :8], mask

    return _own("HunyuanVideoPipeline", hunyuan(), encode)


class StandIn:
    """A real transformer and a real scheduler with a loop of this module's own between them.

    Each step is a forward on the arguments of the zoo's case, which may hold a batch of two, made anew from the seed
    with the step's noise level. Of its prediction a latent is made in its shape, as much of which goes into the model's
    input as has room there.
    """

    def __init__(self, case: Case) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer, self.case = case.build(), case
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.config: dict[str, Any] = {}
        self.name_or_path = "stand-in"
        self.device = torch.device("cpu")

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(
        self,
        prompt: str,
        num_inference_steps: int = 2,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "latent",
    ) -> Any:
        assert generator is not None
        seed = zlib.crc32(prompt.encode()) + generator.initial_seed()
        self.scheduler.set_timesteps(num_inference_steps)
        latents: Any = None
        for step, t in enumerate(self.scheduler.timesteps):
            torch.manual_seed(seed)
            inputs = self.case.inputs(*self.size(step), timestep=float(t))
            if latents is not None:
                self._put(inputs, latents)
            prediction = self.transformer(**inputs)[0]
            if latents is None:
                latents = torch.randn(prediction.shape, generator=generator)
            latents = self.scheduler.step(prediction, t, latents, return_dict=False)[0]
        return SimpleNamespace(images=latents)

    def size(self, step: int) -> tuple[int, int, int]:
        """The grid of a step."""
        return self.case.shapes[0]

    @staticmethod
    def _put(inputs: dict[str, Any], latents: torch.Tensor) -> None:
        name = next(iter(inputs))
        own = inputs[name]
        if isinstance(own, torch.Tensor) and own.ndim == latents.ndim:
            room = tuple(slice(0, min(a, b)) for a, b in zip(own.shape, latents.shape, strict=True))
            own[room] = latents[room]


#: Pipelines of diffusers, by transformer class, and the arguments of a search with them.
OWN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "WanTransformer3DModel": (wan_experts, VIDEO),
    "WanVACETransformer3DModel": (wan_vace, VIDEO),
    "SkyReelsV2Transformer3DModel": (skyreels, VIDEO),
    "SD3Transformer2DModel": (sd35, IMAGE),
    "MochiTransformer3DModel": (mochi, {**VIDEO, "num_frames": 13}),
    "LTXVideoTransformer3DModel": (ltx, {"height": 224, "width": 288, "num_frames": 17}),
    "CogVideoXTransformer3DModel": (cogvideox, VIDEO),
    "AuraFlowTransformer2DModel": (auraflow, IMAGE),
    "QwenImageTransformer2DModel": (qwenimage, {**IMAGE, "true_cfg_scale": 4.0}),
    "Lumina2Transformer2DModel": (lumina2, IMAGE),
    "ZImageTransformer2DModel": (z_image, IMAGE),
    "BriaFibo2Transformer2DModel": (fibo2, IMAGE),
    "FluxTransformer2DModel": (flux_image, IMAGE),
    "ChromaTransformer2DModel": (chroma, IMAGE),
    "HeliosTransformer3DModel": (helios, {"height": 64, "width": 80, "num_frames": 33}),
    "HunyuanVideoTransformer3DModel": (hunyuan_video, VIDEO),
}
