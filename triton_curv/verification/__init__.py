"""A user's own model, made small, against definitions in float64: factors, preconditioned gradients, products."""

from triton_curv.verification.products import ProductRow
from triton_curv.verification.shrink import Shrunken, shrink
from triton_curv.verification.verify import BlockRow, Verdict, verify

__all__ = ["BlockRow", "ProductRow", "Shrunken", "Verdict", "shrink", "verify"]
