"""Features of diffusers that are tested beside a plan, for each transformer class.

The tests go by this table: they fail where a feature named here does not hold, and where one that is left out works.
"""

from __future__ import annotations

__all__ = ["COMMON", "lacking", "more", "features_of"]

#: Tested with every class but those in ``_LACKING``.
COMMON = (
    "compiled blocks",
    "bfloat16",
    "LoRA",
    "fused projections",
    "layerwise casting",
    "group offload",
    "attention backend",
    "pickle",
)

#: Feature -> classes with which diffusers itself refuses it, or which run dense then.
_LACKING: dict[str, tuple[str, ...]] = {
    "compiled blocks": ("MochiTransformer3DModel",),
    "LoRA": (
        "AllegroTransformer3DModel",
        "CogView3PlusTransformer2DModel",
        "DiTTransformer2DModel",
        "EasyAnimateTransformer3DModel",
        "HunyuanDiT2DModel",
        "JoyImageEditPlusTransformer3DModel",
        "JoyImageEditTransformer3DModel",
        "PixArtTransformer2DModel",
    ),
    "fused projections": (
        "AllegroTransformer3DModel",
        "AnyFlowTransformer3DModel",
        "BriaFiboTransformer2DModel",
        "BriaTransformer2DModel",
        "CogView4Transformer2DModel",
        "CosmosTransformer3DModel",
        "DiTTransformer2DModel",
        "EasyAnimateTransformer3DModel",
        "ErnieImageTransformer2DModel",
        "GlmImageTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "Kandinsky5Transformer3DModel",
        "Kandinsky6Transformer3DModel",
        "LTX2VideoTransformer3DModel",
        "Lumina2Transformer2DModel",
        "MochiTransformer3DModel",
        "MotifVideoTransformer3DModel",
        "OvisImageTransformer2DModel",
        "ZImageTransformer2DModel",
    ),
    "group offload": ("DiTTransformer2DModel", "HunyuanDiT2DModel"),
    "attention backend": ("Kandinsky6Transformer3DModel",),
}

_WAN = ("WanTransformer3DModel",)
_FLUX = ("FluxTransformer2DModel",)
_SD3 = ("SD3Transformer2DModel",)

#: Feature -> classes that it is tested with, besides.
_MORE: dict[str, tuple[str, ...]] = {
    "whole pipeline": (*_WAN, *_FLUX),
    "whole model compiled": _WAN,
    "first block cache": (
        *_WAN,
        *_FLUX,
        "CogVideoXTransformer3DModel",
        "CogView4Transformer2DModel",
        "HunyuanImageTransformer2DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "MochiTransformer3DModel",
        "MotifVideoTransformer3DModel",
        "QwenImageTransformer2DModel",
        "WanVACETransformer3DModel",
    ),
    "other caches": _WAN,
    "model offload": _WAN,
    "LoRA files": _WAN,
    "PEFT wrapper": _WAN,
    "quantised weights": _WAN,
    "modular pipeline": _WAN,
    "IP-adapter": (*_FLUX, *_SD3),
    "ControlNet": (
        *_FLUX,
        *_SD3,
        "BriaTransformer2DModel",
        "ChromaTransformer2DModel",
        "CosmosTransformer3DModel",
        "QwenImageTransformer2DModel",
    ),
}


def lacking(model_class: str) -> tuple[str, ...]:
    """Of the common features, those that this class does not have."""
    return tuple(feature for feature in COMMON if model_class in _LACKING.get(feature, ()))


def more(model_class: str) -> tuple[str, ...]:
    """What is tested with this class beside the common features."""
    return tuple(feature for feature, classes in _MORE.items() if model_class in classes)


def features_of(model_class: str) -> tuple[str, ...]:
    """All that is tested with a class."""
    without = lacking(model_class)
    return tuple(feature for feature in COMMON if feature not in without) + more(model_class)
