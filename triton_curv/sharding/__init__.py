"""Curvature shared out over ranks: who owns what, what is sent, and the collectives that send it."""

from triton_curv.sharding.buckets import Bucket, Piece, even_splits, overlaps
from triton_curv.sharding.costs import A100, H100, V100, Machine
from triton_curv.sharding.grid import Grid
from triton_curv.sharding.layers import FactorSize, LayerSize, layer_sizes
from triton_curv.sharding.plan import Plan, PlanOptions, make_plan

__all__ = [
    # integers in
    "FactorSize",
    "LayerSize",
    "Machine",
    "PlanOptions",
    "layer_sizes",
    "A100",
    "H100",
    "V100",
    # integers out
    "Bucket",
    "Grid",
    "Piece",
    "Plan",
    "even_splits",
    "make_plan",
    "overlaps",
]
