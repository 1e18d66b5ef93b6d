"""Sparse attention for diffusers."""
