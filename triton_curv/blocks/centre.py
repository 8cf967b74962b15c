"""Covariance of output gradients instead of their second moment: what of G is left when the mean gradient is out."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from triton_curv.blocks.bank import FactorKey, FactorStore, Normalisation
from triton_curv.blocks.block import Block
from triton_curv.blocks.conv import ConvRule
from triton_curv.blocks.conv_rows import ConvRowsRule
from triton_curv.blocks.dense import DenseRule, TransposedDenseRule
from triton_curv.hostcheck import known_true
from triton_curv.packing import pack

MOST = 0.999  # of the trace of G that is taken out: a lone sample has no covariance, and G would have no scale
CENTRED = (ConvRule, ConvRowsRule, DenseRule, TransposedDenseRule)  # rules that register a scaled signal are not


class Means(NamedTuple):
    """b of some blocks, sums over rows of a mean loss's output gradients, and T, rows of one sample.

    `signals` are (groups, d_out), of factors `keys`, `positions` (blocks,). G - b b^T / T is their covariance, summed
    over a sample's positions: positive semidefinite, because b b^T <= T G. The gradient of the bias is b. Where that is
    not finite, b and T are 0.

    Of samples that are all alike, or of one, nothing would be left but rounding, by which no damping can be measured:
    then `MOST` of G goes, and its direction and what is damped relative to it stay those of G.
    """

    keys: Sequence[FactorKey]
    signals: Sequence[Tensor]
    positions: Tensor

    def weights(self, traces: Sequence[Tensor]) -> list[Tensor]:
        """1 / T or less, for each of a factor's matrices, whose `traces` are given; 0 where T is 0 or not finite."""
        sizes = [len(signal) for signal in self.signals]
        of_groups = [each.view(size, -1) for each, size in zip(traces, sizes, strict=True)]
        positions = self.positions
        if sum(sizes) > len(sizes):
            positions = torch.cat([each.expand(size) for each, size in zip(positions.unbind(), sizes, strict=True)])
        squares = torch.cat([signal.square().sum(1) for signal in self.signals])
        most = MOST * torch.cat([each.sum(1) for each in of_groups]) / squares
        most = torch.where(squares > 0, most, torch.inf)
        usable = (positions > 0) & positions.isfinite()
        weights = torch.where(usable, torch.minimum(most, 1 / positions), 0.0).split(sizes)
        return [w[:, None].expand_as(each).reshape(-1) for w, each in zip(weights, of_groups, strict=True)]


def outer(signal: Tensor, size: int) -> Tensor:
    """b b^T, (groups, d_out, d_out), or its diagonal blocks of a size, from b (groups, d_out)."""
    signal = signal.reshape(-1, size, 1)
    return signal * signal.mT


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
) -> Means:
    """From the gradients of biases and (rows, samples) of all blocks, (2, blocks), as they are before the fold."""
    rows, samples = counts.unbind()
    positions, samples_of = (rows / samples).unbind(), samples.unbind()
    signals = []
    for block, gradient in zip(blocks, gradients, strict=True):
        signal = gradient.view(block.rule.matrix_shape[:2])
        signal = signal if loss_scale == 1.0 else signal / loss_scale
        signals.append(signal / samples_of[block.index] if how.summed else signal)
    of_blocks = torch.stack([positions[block.index] for block in blocks])
    finite = torch.stack([signal.sum() for signal in signals]).isfinite()
    if not known_true(finite):
        signals = [torch.where(fine, signal, 0.0) for fine, signal in zip(finite.unbind(), signals, strict=True)]
        of_blocks = torch.where(finite, of_blocks, 0.0)
    return Means([block.keys["G"] for block in blocks], signals, of_blocks)


def centre_(store: FactorStore, means: Means, before: Tensor, decay: float) -> None:
    """Take b b^T / T out of what the last fold added to the averages of G. `before`: `store.folds` before it."""
    fresh = torch.where(store.folds > before, (1 - decay) / (1 - decay**store.folds), 0.0)
    places = [store.rows(key) for key in means.keys]
    weights = means.weights([store.folded_traces[rows] for rows in places])
    for key, signal, rows, weight in zip(means.keys, means.signals, places, weights, strict=True):
        if store.owns(key):
            size = store.size(key)
            products = signal.reshape(-1, 1).square() if size == 1 else pack(outer(signal, size))
            store.packed(key).view(products.shape).sub_(products.mul_((fresh[rows] * weight)[:, None]))
