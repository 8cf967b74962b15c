"""Covariance of output gradients instead of their second moment: what of G is left when the mean gradient is out."""

from collections.abc import Iterable, Mapping
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

CENTRED = (ConvRule, ConvRowsRule, DenseRule, TransposedDenseRule)  # rules that register a scaled signal are not


class Mean(NamedTuple):
    """b, the sum over rows of a mean loss's output gradients, (groups, d_out), and T, rows of one sample, ().

    G - b b^T / T is their covariance, summed over a sample's positions: positive semidefinite, because
    b b^T <= T G. The gradient of the bias is b.
    """

    signal: Tensor
    positions: Tensor

    def weight(self) -> Tensor:
        """1 / T; 0 where T is not known, or b is not finite."""
        usable = (self.positions > 0) & self.positions.isfinite() & self.signal.sum().isfinite()
        return torch.where(usable, 1 / self.positions, 0.0)

    def outer(self) -> Tensor:
        """b b^T, (groups, d_out, d_out); 0 where b is not finite."""
        signal = torch.where(self.signal.sum().isfinite(), self.signal, 0.0)
        return signal[:, :, None] * signal[:, None, :]


def means_of(
    blocks: Iterable[Block], store: FactorStore, how: Normalisation, loss_scale: float
) -> dict[FactorKey, Mean]:
    """Of Linear and Conv layers with a bias that has a gradient; call it before the fold, which empties the counts."""
    means = {}
    for block in blocks:
        key, bias = block.keys.get("G"), block.rule.params.get("bias")
        if key is None or bias is None or bias.grad is None or type(block.rule) not in CENTRED:
            continue
        groups, rows, _ = block.rule.matrix_shape
        gradient = bias.grad.full_tensor() if isinstance(bias.grad, DTensor) else bias.grad
        samples = store.seen()[block.index]
        signal = gradient.to(samples.dtype).view(groups, rows) / loss_scale
        means[key] = Mean(signal / samples if how.summed else signal, store.counts[block.index, 0] / samples)
    return means


def centre_(store: FactorStore, means: Mapping[FactorKey, Mean], before: Tensor, decay: float) -> None:
    """Take b b^T / T out of what the last fold added to the averages of G. `before`: `store.folds` before it."""
    for key, mean in means.items():
        if not store.owns(key):
            continue
        rows = store.rows(key)
        folds = store.folds[rows]
        weight = torch.where(folds > before[rows], (1 - decay) / (1 - decay**folds), 0.0) * mean.weight()
        store.packed(key).view(len(folds), -1).sub_(pack(mean.outer()).mul_(weight[:, None]))
