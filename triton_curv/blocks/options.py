"""Choices about a layer's curvature that fix the shapes of its factors."""

from dataclasses import dataclass
from typing import Literal

NormFisher = Literal["unit", "diagonal", "full"]
WeightSharing = Literal["expand", "reduce"]


@dataclass(frozen=True)
class LayerOptions:
    """How the curvature of one layer is approximated.

    norm_fisher: "unit" (2x2 per channel), "diagonal" or "full", for the scale and shift of normalisation layers.
    weight_sharing: what positions (tokens, pixels) that share a weight are. "expand": rows of their own, exact
        where the loss sums over positions. "reduce": inputs are averaged and gradients summed over positions first,
        exact where the net averages over them. Source: arXiv 2311.00636.
    max_factor_dim: factors with more rows are split into diagonal blocks or made diagonal.
    max_output_dim: of linear layers with more outputs than this, G is diagonal: one batch has too few samples to tell
        so many directions apart, and the damped inverse of what it has makes the others rule the step.
    conv_samples: convolutions take A from the first samples of a batch, this many, or as many more as give 4 patches
        for each coordinate; G from all. 0: all.
    batch_dim: the dimension of samples in inputs with positions, (batch, time, features) or (time, batch, features).
    """

    norm_fisher: NormFisher = "unit"
    weight_sharing: WeightSharing = "expand"
    max_factor_dim: int = 8192
    max_output_dim: int = 64
    conv_samples: int = 0
    batch_dim: int = 0
