"""Convolution inputs as rows: every output position's receptive field."""

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd


def padding_amounts(conv: _ConvNd) -> list[int]:
    """(left, right) per spatial dimension, first dimension first; 'same' puts the odd one to the right."""
    if isinstance(conv.padding, str):
        if conv.padding == "valid":
            return [0] * (2 * len(conv.kernel_size))
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [side for total in totals for side in (total // 2, total - total // 2)]
    return [amount for amount in conv.padding for _ in range(2)]


def pad_input(conv: _ConvNd, inputs: Tensor) -> Tensor:
    """The input as the convolution sees it, padded by `conv.padding` in `conv.padding_mode`."""
    amounts = padding_amounts(conv)
    if not any(amounts):
        return inputs
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    flat = [side for pair in reversed(pairs) for side in pair]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return functional.pad(inputs, flat, mode=mode)


def patch_rows(conv: _ConvNd, inputs: Tensor) -> Tensor:
    """`torch.nn.functional.unfold` for 1-3 dimensions, all padding modes, stride, dilation and groups.

    inputs (samples, channels, *spatial) -> (groups, samples * positions, prod(kernel) * channels/groups). Columns are
    ordered kernel position first, channel last, so that whole channel vectors are copied.
    """
    dims = len(conv.kernel_size)
    padded = pad_input(conv, inputs)
    padded = padded.movedim(1, -1).contiguous()
    samples, *spatial, channels = padded.shape
    positions = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(spatial, conv.kernel_size, conv.stride, conv.dilation, strict=True)
    ]
    strides = padded.stride()
    per_group = channels // conv.groups
    view = torch.as_strided(
        padded,
        (conv.groups, samples, *positions, *conv.kernel_size, per_group),
        (
            per_group,
            strides[0],
            *(strides[1 + i] * conv.stride[i] for i in range(dims)),
            *(strides[1 + i] * conv.dilation[i] for i in range(dims)),
            1,
        ),
    )
    return view.reshape(conv.groups, -1, math.prod(conv.kernel_size) * per_group)
