"""Block-sparse attention kernels: `(q, k, v, layout) -> output`.  Knows only the vocabulary in `diffsparse/`."""
