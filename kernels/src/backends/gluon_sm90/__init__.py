"""Hopper GPUs: a warp-specialised kernel in Gluon. ``device`` and ``eight`` (products in 8 bits) have the kernel and
``parts`` what they share; ``host`` launches it; ``prepare``, ``quantize`` and ``wide`` make what it reads."""
