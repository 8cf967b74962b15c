"""Damping: how the one number lambda is shared between the factors of a block."""

import torch
from torch import Tensor


def kronecker_shifts(mean_A: Tensor, mean_G: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Multiples of I added to A and G: pi sqrt(lambda) and sqrt(lambda)/pi, pi^2 = mean_A / mean_G.

    `mean_A` and `mean_G` are the mean eigenvalues tr A/dim A and tr G/dim G (any shape), `damping` is lambda
    (broadcastable). The product of the two shifts is lambda. A factor that is exactly zero (dead layer) leaves both
    shifts finite. Source: arXiv 1811.12019 section 3; Martens and Grosse 2015 section 6.3.
    """
    tiny = torch.finfo(mean_A.dtype).tiny
    pi = torch.sqrt(mean_A.clamp_min(tiny)) / torch.sqrt(mean_G.clamp_min(tiny))
    root = torch.sqrt(damping)
    return pi * root, root / pi
