"""What ``benchmarks/kernels.py`` is made of: the calls that are timed (``cases``), other packages' kernels (``peers``),
the check before a kernel is timed (``sampled``), and the timing of all of them side by side (``measure``)."""
