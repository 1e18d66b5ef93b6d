"""Usual sizes of the released models, and their token grids without text. For the table of supported models."""

from __future__ import annotations

from diffsparse.grid import TokenGrid

__all__ = ["USUAL_SIZES"]

_WAN = ("480 x 832, 81 frames", TokenGrid(21, 30, 52))
_HD = ("1024 x 1024", TokenGrid(1, 64, 64))

#: Transformer class -> size in pixels, grid.
USUAL_SIZES: dict[str, tuple[str, TokenGrid]] = {
    "AllegroTransformer3DModel": ("720 x 1280, 88 frames", TokenGrid(22, 45, 80)),
    "AnyFlowTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "CogVideoXTransformer3DModel": ("480 x 720, 49 frames", TokenGrid(13, 30, 45)),
    "ConsisIDTransformer3DModel": ("480 x 720, 49 frames", TokenGrid(13, 30, 45)),
    "CosmosTransformer3DModel": ("704 x 1280, 121 frames", TokenGrid(16, 44, 80)),
    "EasyAnimateTransformer3DModel": ("512 x 512, 49 frames", TokenGrid(13, 32, 32)),
    "HeliosTransformer3DModel": ("384 x 640, 33 frames at a time", TokenGrid(9, 24, 40)),
    "HunyuanVideo15Transformer3DModel": ("720 x 1280, 121 frames", TokenGrid(31, 45, 80)),
    "HunyuanVideoFramepackTransformer3DModel": ("720 x 1280, 33 frames at a time", TokenGrid(9, 45, 80)),
    "HunyuanVideoTransformer3DModel": ("720 x 1280, 129 frames", TokenGrid(33, 45, 80)),
    "Kandinsky5Transformer3DModel": ("512 x 768, 121 frames", TokenGrid(31, 32, 48)),
    "Kandinsky6Transformer3DModel": ("512 x 768, 121 frames", TokenGrid(31, 32, 48)),
    "LTX2VideoTransformer3DModel": ("512 x 768, 121 frames", TokenGrid(16, 16, 24)),
    "LTXVideoTransformer3DModel": ("512 x 704, 161 frames", TokenGrid(21, 16, 22)),
    "MochiTransformer3DModel": ("480 x 848, 163 frames", TokenGrid(28, 30, 53)),
    "MotifVideoTransformer3DModel": ("736 x 1280, 121 frames", TokenGrid(31, 46, 80)),
    "SkyReelsV2Transformer3DModel": ("544 x 960, 97 frames", TokenGrid(25, 34, 60)),
    "WanAnimateTransformer3DModel": ("720 x 1280, 77 frames and a reference", TokenGrid(21, 45, 80)),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "AuraFlowTransformer2DModel": _HD,
    "BriaFibo2Transformer2DModel": _HD,
    "BriaFiboTransformer2DModel": _HD,
    "BriaTransformer2DModel": _HD,
    "ChromaTransformer2DModel": _HD,
    "CogView3PlusTransformer2DModel": _HD,
    "CogView4Transformer2DModel": _HD,
    "DiTTransformer2DModel": ("512 x 512", TokenGrid(1, 32, 32)),
    "ErnieImageTransformer2DModel": _HD,
    "Flux2Transformer2DModel": _HD,
    "Flux3Transformer2DModel": _HD,
    "FluxTransformer2DModel": _HD,
    "GlmImageTransformer2DModel": _HD,
    "HiDreamImageTransformer2DModel": _HD,
    "HunyuanDiT2DModel": _HD,
    "HunyuanImageTransformer2DModel": ("2048 x 2048", TokenGrid(1, 64, 64)),
    "Ideogram4Transformer2DModel": ("2048 x 2048", TokenGrid(1, 128, 128)),
    "JoyImageEditPlusTransformer3DModel": _HD,
    "JoyImageEditTransformer3DModel": _HD,
    "Krea2Transformer2DModel": _HD,
    "LongCatImageTransformer2DModel": _HD,
    "Lumina2Transformer2DModel": _HD,
    "OvisImageTransformer2DModel": _HD,
    "PixArtTransformer2DModel": _HD,
    "QwenImageTransformer2DModel": ("1328 x 1328", TokenGrid(1, 83, 83)),
    "SD3Transformer2DModel": _HD,
    "ZImageTransformer2DModel": _HD,
}
