"""What ``benchmarks/pipeline.py`` is made of: the transformers that are timed (``models``), what stands in for their
attention (``attention``), the plans they run (``plans``), the timing of one step after another (``measure``), a row for
each step (``rows``) and the picture of all of them (``plot``)."""
