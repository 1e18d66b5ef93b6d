"""A sparsity plan, attached to a diffusers pipeline. Knows the vocabulary and the kernels."""

from diffsparse.pipelines import families as _families  # registers the known transformer classes
from diffsparse.pipelines.attach import disable_sparse_attention, enable_sparse_attention, sparse_attention
from diffsparse.pipelines.family import (
    Family,
    UnknownGridError,
    UnsupportedModelError,
    architecture_of,
    find_transformers,
    register_family,
)
from diffsparse.pipelines.resolve import cache_folder
from diffsparse.pipelines.summary import SparseSummary, sparse_attention_summary
from diffsparse.pipelines.tap import AttentionCall, tap_attention

__all__ = [
    "AttentionCall",
    "Family",
    "SparseSummary",
    "UnknownGridError",
    "UnsupportedModelError",
    "architecture_of",
    "cache_folder",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "find_transformers",
    "register_family",
    "sparse_attention",
    "sparse_attention_summary",
    "tap_attention",
]
del _families
