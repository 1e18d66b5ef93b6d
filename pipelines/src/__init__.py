"""A sparsity plan, attached to a diffusers pipeline.  Knows the vocabulary and the kernels."""
