"""Flux and its kin: one sequence of text, then an image, and reference images behind it (Kontext, editing)."""

from __future__ import annotations

from typing import Any

from diffsparse.pipelines.families.common import packed_images, packed_patch
from diffsparse.pipelines.family import Family

LAYERS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")


def _unpacked_patch(config: Any) -> tuple[int, int, int]:
    return (1, 1, 1)


FAMILIES = (
    Family(
        name="flux",
        classes=("FluxTransformer2DModel",),
        layers=LAYERS,
        grid=packed_images,
        patch_size=packed_patch,
        text_position="before",
        timestep_scale="unit",
    ),
    Family(
        # Its attention_mask is added to the logits of all pairs, as 1 and 0: no padding mask, so such forwards run
        # dense. All of its pipeline's do.
        name="chroma",
        classes=("ChromaTransformer2DModel",),
        layers=LAYERS,
        grid=packed_images,
        patch_size=packed_patch,
        text_position="before",
        timestep_scale="unit",
        stays_dense="whenever the pipeline passes its additive text mask, as Chroma's own pipelines do",
    ),
    Family(
        name="ovis_image",
        classes=("OvisImageTransformer2DModel",),
        layers=LAYERS,
        grid=packed_images,
        patch_size=packed_patch,
        text_position="before",
        timestep_scale="unit",
    ),
    Family(
        name="longcat_image",
        classes=("LongCatImageTransformer2DModel",),
        layers=LAYERS,
        grid=packed_images,
        patch_size=packed_patch,
        text_position="before",
        timestep_scale="unit",
    ),
    Family(
        name="bria",
        classes=("BriaTransformer2DModel",),
        layers=LAYERS,
        grid=packed_images,
        patch_size=packed_patch,
        text_position="before",
    ),
    Family(
        # Padded text is masked by a key mask, which the pipeline gives by joint_attention_kwargs.
        name="bria_fibo",
        classes=("BriaFiboTransformer2DModel",),
        layers=LAYERS,
        grid=packed_images,
        patch_size=_unpacked_patch,
        text_position="before",
        stays_dense="calls with a mask of all pairs of tokens",
    ),
)
