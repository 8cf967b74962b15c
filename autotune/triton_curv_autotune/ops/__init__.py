"""Declarations of the ops that can be tuned, one file a family."""

from triton_curv_autotune.ops import factor, updates

__all__ = ["factor", "updates"]
