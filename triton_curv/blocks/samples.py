"""N: how many samples the loss of a block's pending statistics is a mean over."""

import torch
from torch import Tensor

from triton_curv.hostcheck import known_true, on_host


def samples_of(counts: Tensor, shared: Tensor, folded: Tensor, ranks: int = 1) -> Tensor:
    """N of each block, (blocks,), from `counts` (blocks, 1 + calls): rows, and samples of the first, second, ... calls.

    It is the largest of the latter; of `shared` blocks, whose calls serve a whole batch, the largest of the others. If
    these have no pending statistics, it is a share of 1 / ranks of what they had in the last fold, `folded`.
    """
    samples = counts[:, 1:].amax(1)
    if on_host(shared) and known_true(shared == 0):
        return samples
    pending, last = ((each * (1 - shared)).amax() for each in (samples, folded))
    others = torch.where(pending > 0, pending, last / ranks)
    return torch.where((shared > 0) & (samples > 0) & (others > 0), others, samples)
