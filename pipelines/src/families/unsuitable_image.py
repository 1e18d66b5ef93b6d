"""Image models that cannot run sparse attention, with the reason."""

from __future__ import annotations

FAMILIES = ()

_PART = "its queries are of the image alone, its keys of image and text, so there is no self-attention of one sequence"
_UNET = "it is a U-Net, where attention runs at several resolutions; only diffusion transformers can"

UNSUITABLE = {
    "SanaTransformer2DModel": "its self-attention is linear, so it computes no pairs of tokens that could be left out",
    "OmniGenTransformer2DModel": (
        "text and input images come first under a causal mask of their own, so its attention takes a mask of all pairs "
        "of tokens"
    ),
    "QwenImage21Transformer2DModel": (
        "its attention is causal from block to block of text and images, and reads cached keys of earlier ones"
    ),
    "NucleusMoEImageTransformer2DModel": _PART,
    "PRXTransformer2DModel": _PART,
    "LuminaNextDiT2DModel": (
        "every layer gets a mask over image tokens; its successor Lumina2Transformer2DModel gets none, and is supported"
    ),
    "UVit2DModel": "it fills in discrete tokens, too few for sparse attention to pay",
    "Transformer2DModel": "it is a part of a U-Net, or fills in discrete tokens (VQ-Diffusion)",
    "PriorTransformer": "it makes an embedding of an image, and has no image tokens",
    "UNet2DModel": _UNET,
    "UNet2DConditionModel": _UNET,
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
    "I2VGenXLUNet": _UNET,
    "Kandinsky3UNet": _UNET,
    "StableCascadeUNet": _UNET,
}
