"""What the benchmarks are made of. For ``benchmarks/kernels.py``: the calls that are timed (``cases``), other packages'
kernels (``peers``), the check before a kernel is timed (``sampled``), and the timing of all of them side by side
(``measure``). For ``benchmarks/pipeline.py``: ``steps``."""
