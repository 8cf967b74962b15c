"""Layers y = W a + b on rows of features: what counts as a row where positions share the weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from triton_curv.blocks.options import LayerOptions
from triton_curv.blocks.rule import MaskedSource, Source, Uses
from triton_curv.blocks.side import Side


class Rows(NamedTuple):
    """Inputs (k, n) and signals (k', m) as rows; whether the inputs' last coordinate, 1, is still to be added."""

    inputs: Tensor
    signal: Tensor
    ones: bool
    uses: Uses


def samples_first(tensor: Tensor, batch_dim: int, features: int = 1) -> Tensor:
    """A view of (..., features) as (samples, positions..., features); a lone sample gets a dimension of its own."""
    if tensor.dim() == features:
        return tensor[None]
    return tensor.movedim(batch_dim, 0) if tensor.dim() > 1 + features else tensor


def mask_fits(mask: Tensor, inputs: Tensor, options: LayerOptions) -> bool:
    """Whether a mask (samples, positions...) belongs to inputs with features."""
    return mask.shape == samples_first(inputs, options.batch_dim).shape[:-1]


def rows_of(inputs: Tensor, signal: Tensor, ones: bool, options: LayerOptions, mask: Tensor | None) -> Rows:
    """Inputs and signals of one call, (samples, positions..., features), as `options.weight_sharing` counts rows.

    Positions where `mask` is False take no part in A; it is ignored unless it has the shape of all positions.
    """
    inputs, signal = samples_first(inputs, options.batch_dim), samples_first(signal, options.batch_dim)
    samples, *positions, width = inputs.shape
    count = math.prod(positions)
    if mask is not None and mask.shape != inputs.shape[:-1]:
        mask = None
    if not positions or options.weight_sharing == "expand":
        rows, signal = inputs.reshape(samples * count, width), signal.reshape(samples * count, signal.shape[-1])
        if mask is None:
            return Rows(rows, signal, ones, Uses(samples, samples * count))
        real = mask.reshape(-1, 1).to(signal.dtype)
        used: int | Tensor = mask.sum().clamp_min(1)  # an integer: a count in fp16 ends at 65504
        rows = rows * real
    else:
        signal = signal.reshape(samples, count, signal.shape[-1]).sum(1)
        rows = inputs.reshape(samples, count, width)
        if mask is None:
            return Rows(rows.mean(1), signal, ones, Uses(samples, samples))
        weights = mask.reshape(samples, count, 1)
        lengths = weights.sum(1)
        rows = (rows * weights).sum(1) / lengths.clamp_min(1)
        real = (lengths > 0).to(signal.dtype)
        used = (lengths > 0).sum().clamp_min(1)
    return Rows(torch.cat([rows, real], dim=1) if ones else rows, signal, False, Uses(samples, used))


class RowsSource(MaskedSource):
    """Statistics of y = W a + b: A += a^T a and G += g^T g over rows."""

    options: LayerOptions
    has_bias: bool
    input_side: Side
    output_side: Side

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """A += a^T a and G += g^T g over all rows."""
        return self.accumulate_masked_(sums, inputs, grad_output, None)

    def accumulate_masked_(
        self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, mask: Tensor | None
    ) -> Uses:
        """The same, without the inputs at positions where `mask` is False."""
        rows = rows_of(inputs, grad_output, self.has_bias, self.options, mask)
        self.input_side.accumulate_(sums, rows.inputs, rows.ones)
        self.output_side.accumulate_(sums, rows.signal)
        return rows.uses

    def fits(self, mask: Tensor, inputs: Tensor) -> bool:
        """Whether there is an input at each of its places."""
        return mask_fits(mask, inputs, self.options)

    def masked(self, mask: Tensor) -> Source:
        """The same source with a mask."""
        return MaskedRows(self, mask)


@dataclass(frozen=True)
class MaskedRows:
    """A source of rows together with a mask."""

    source: "RowsSource"
    mask: Tensor

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """As the source, without the inputs at masked positions."""
        return self.source.accumulate_masked_(sums, inputs, grad_output, self.mask)


def notes(options: LayerOptions, *sides: Side) -> str:
    """What `explain()` adds for weight sharing and large factors."""
    reduced = ["positions averaged (reduce)"] if options.weight_sharing == "reduce" else []
    return "".join(f"; {note}" for note in [*reduced, *(side.note for side in sides)] if note)
