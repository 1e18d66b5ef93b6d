"""Video transformers that block-sparse attention cannot help, each with its reason."""

from __future__ import annotations

UNSUITABLE = {
    "LatteTransformer3DModel": (
        "it attends within frames and along time in turn, so its sequences are too short for sparse attention to help"
    ),
    "MiniMaxH3Transformer3DModel": (
        "text, video and sound are packed into one sequence in an order that differs from request to request, so it is "
        "not a grid of video tokens"
    ),
    "SanaWMLTX2RefinerTransformer3DModel": "it attends to a sliding cache of earlier keys, so queries and keys differ",
    "SanaWMTransformer3DModel": (
        "most of its layers are linear attention, which has no weights between pairs of tokens that could be skipped"
    ),
    "SanaVideoTransformer3DModel": (
        "its self-attention is linear attention, which has no weights between pairs of tokens that could be skipped"
    ),
}
