"""Declarations of the ops that can be tuned, one file a family."""

from triton_curv_autotune.ops import factor, inverse, patch, symmetric, updates

__all__ = ["factor", "inverse", "patch", "symmetric", "updates"]
