"""What K-FAC does to a model before a step is taken: coverage, memory, FLOPs, refresh cost, from shapes alone."""

from triton_curv.explanation.explain import explain
from triton_curv.explanation.layers import Explanation, LayerRow
from triton_curv.explanation.page import write_page
from triton_curv.explanation.ranks import Ranks, on_ranks

__all__ = ["Explanation", "LayerRow", "Ranks", "explain", "on_ranks", "write_page"]
