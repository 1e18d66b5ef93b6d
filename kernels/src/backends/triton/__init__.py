"""Any GPU that Triton supports. ``device`` has the kernel, ``host`` launches it; ``prepare`` and ``unpack`` make what
it reads."""
