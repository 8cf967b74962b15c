"""Rows of torch.nn's layers that multiply patches or features by a weight, and gradients laid out to match."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from triton_curv.verification.kronecker import Rows
from triton_curv.verification.seen import Seen

LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def rows_of(layer: nn.Module, call: Seen, bias: bool) -> Rows:
    """a and g of a call of one of `LINEAR` or `CONVOLUTIONS`; with `bias` a 1 follows in every a."""
    x, g = call.inputs, call.grad
    if isinstance(layer, LINEAR):
        return linear_rows(x, g, bias)
    if isinstance(layer, _ConvTransposeNd):
        patches = _patches(layer, g, layer.out_channels, 1)
        for i, size in enumerate(x.shape[2:]):  # output_padding leaves room for patches that no input feeds
            patches = patches.narrow(2 + i, 0, size)
        return Rows(x.flatten(2).mT[:, :, None], patches.flatten(2).mT[:, :, None])
    assert isinstance(layer, _ConvNd)
    a = _patches(layer, x, layer.in_channels, layer.groups).flatten(2).mT.unflatten(-1, (layer.groups, -1))
    return Rows(_with_ones(a) if bias else a, g.flatten(2).mT.unflatten(-1, (layer.groups, -1)))


def linear_rows(x: Tensor, g: Tensor, bias: bool) -> Rows:
    """(N, positions..., features) as rows."""
    a = x.reshape(len(x), -1, 1, x.shape[-1])
    return Rows(_with_ones(a) if bias else a, g.reshape(len(g), -1, 1, g.shape[-1]))


def _with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)


def _patches(layer: _ConvNd, x: Tensor, channels: int, groups: int) -> Tensor:
    """(N, channels * kernel, positions...): a convolution of this geometry whose filters each pick one number."""
    kernel, per_group = layer.kernel_size, channels // groups
    count = per_group * math.prod(kernel)
    pick = torch.eye(count, dtype=x.dtype).reshape(count, per_group, *kernel)
    if isinstance(layer, _ConvTransposeNd):
        convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
        patches: Tensor = convolve(x, pick, None, layer.stride, layer.padding, layer.dilation)
        return patches
    of_any_dimension: Any = layer
    return cast("Tensor", of_any_dimension._conv_forward(x, pick.repeat(groups, *(1 for _ in kernel), 1), None))


def matrix_of(layer: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
    """Gradients of such a layer as D (groups, rows, columns); the bias is the last column."""
    weight = values["weight"]
    if isinstance(layer, _ConvTransposeNd):
        return weight.flatten(1).T[None]
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    return torch.cat([matrix, values["bias"].reshape(groups, -1, 1)], dim=2) if "bias" in values else matrix
