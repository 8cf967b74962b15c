"""Covariance of output gradients instead of their second moment: what of G is left when the mean gradient is out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from triton_curv.blocks.bank import FactorKey, FactorStore, Normalisation
from triton_curv.blocks.block import Block
from triton_curv.blocks.conv import ConvRule
from triton_curv.blocks.conv_rows import ConvRowsRule
from triton_curv.blocks.dense import DenseRule, TransposedDenseRule
from triton_curv.packing import pack

MOST = 0.999  # of the trace of G that is taken out: a lone sample has no covariance, and G would have no scale
CENTRED = (ConvRule, ConvRowsRule, DenseRule, TransposedDenseRule)  # rules that register a scaled signal are not


class Mean(NamedTuple):
    """b, the sum over rows of a mean loss's output gradients, (groups, d_out), and T, rows of one sample, ().

    G - b b^T / T is their covariance, summed over a sample's positions: positive semidefinite, because
    b b^T <= T G. The gradient of the bias is b.

    Of samples that are all alike, or of one, nothing would be left but rounding, by which no damping can be measured:
    then `MOST` of G goes, and its direction and what is damped relative to it stay those of G.
    """

    signal: Tensor
    positions: Tensor

    def weight(self, traces: Tensor) -> Tensor:
        """1 / T or less, for each of the factor's matrices, whose `traces` are given; 0 where T or b is not finite."""
        usable = (self.positions > 0) & self.positions.isfinite() & self.signal.sum().isfinite()
        of_groups = traces.view(len(self.signal), -1)
        squares = self.signal.square().sum(1, keepdim=True)
        most = torch.where(squares > 0, MOST * of_groups.sum(1, keepdim=True) / squares, torch.inf)
        return torch.where(usable, torch.minimum(most, 1 / self.positions), 0.0).expand_as(of_groups).reshape(-1)

    def outer(self, size: int) -> Tensor:
        """b b^T, (groups, d_out, d_out), or its diagonal blocks of a size; 0 where b is not finite."""
        signal = torch.where(self.signal.sum().isfinite(), self.signal, 0.0).reshape(-1, size)
        return signal[:, :, None] * signal[:, None, :]


def centred_blocks(blocks: Iterable[Block]) -> list[Block]:
    """Linear and Conv layers with a bias that is trained."""
    return [
        block for block in blocks if type(block.rule) in CENTRED and "bias" in block.rule.params and "G" in block.keys
    ]


def gradients_of_biases(blocks: Sequence[Block], like: Tensor) -> list[Tensor]:
    """Zeros where there is none, so that all ranks have as many."""
    found = []
    for block in blocks:
        bias = block.rule.params["bias"]
        grad = bias.grad.full_tensor() if isinstance(bias.grad, DTensor) else bias.grad
        found.append(like.new_zeros(bias.shape) if grad is None else grad.to(like.dtype))
    return found


def means_of(
    blocks: Sequence[Block], gradients: Sequence[Tensor], counts: Tensor, how: Normalisation, loss_scale: float
) -> dict[FactorKey, Mean]:
    """From the gradients of biases and (rows, samples) of all blocks, (2, blocks), as they are before the fold."""
    means = {}
    for block, gradient in zip(blocks, gradients, strict=True):
        groups, rows, _ = block.rule.matrix_shape
        seen, samples = counts[:, block.index]
        signal = gradient.view(groups, rows) / loss_scale
        means[block.keys["G"]] = Mean(signal / samples if how.summed else signal, seen / samples)
    return means


def centre_(store: FactorStore, means: Mapping[FactorKey, Mean], before: Tensor, decay: float) -> None:
    """Take b b^T / T out of what the last fold added to the averages of G. `before`: `store.folds` before it."""
    for key, mean in means.items():
        if not store.owns(key):
            continue
        rows = store.rows(key)
        folds = store.folds[rows]
        weight = torch.where(folds > before[rows], (1 - decay) / (1 - decay**folds), 0.0)
        weight = weight * mean.weight(store.folded_traces[rows])
        store.packed(key).view(len(folds), -1).sub_(pack(mean.outer(store.size(key))).mul_(weight[:, None]))
