"""Transposed convolutions: A = E[mean over positions of x x^T], G = E[sum over positions of g-patch g-patch^T]."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.conv import _ConvTransposeNd

from triton_curv.blocks.options import LayerOptions
from triton_curv.blocks.patches import patch_rows
from triton_curv.blocks.rows import notes
from triton_curv.blocks.rule import Rule, Uses
from triton_curv.blocks.side import Side


class ConvTransposeRule:
    """Kronecker factors of the weight of `torch.nn.ConvTranspose1d/2d/3d`, one group.

    The layer is the adjoint of a convolution: every input pixel x goes through one linear map to a patch of the output,
    whose gradient is the patch of g that the convolution of the same geometry would read. Its bias is not an input of
    that map and has no block.
    """

    def __init__(self, module: _ConvTransposeNd, params: Mapping[str, Parameter], options: LayerOptions) -> None:
        self.module = module
        self.params = {"weight": params["weight"]}
        self.reduce = options.weight_sharing == "reduce"
        self.kernel = [int(k) for k in module.weight.shape[2:]]
        rows = module.out_channels * math.prod(self.kernel)
        self.input_side = Side.of("A", module.in_channels, options.max_factor_dim)
        self.output_side = Side.of("G", rows, options.max_factor_dim)
        self.factor_shapes = {**self.input_side.shapes, **self.output_side.shapes}
        self.matrix_shape = (1, rows, module.in_channels)
        order = torch.arange(rows, device=module.weight.device).view(math.prod(self.kernel), module.out_channels)
        self.weight_order = order.T.flatten()
        self.approximation = "Kronecker over input pixels" + notes(options, self.input_side, self.output_side)

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """A += x^T x over input pixels, G += p^T p over the patches p of the output's gradient that they feed."""
        if inputs.dim() == len(self.kernel) + 1:
            inputs, grad_output = inputs[None], grad_output[None]
        samples, channels, *sizes = inputs.shape
        patches = patch_rows(self.module, grad_output)
        padding = [int(p) for p in self.module.padding]
        positions = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                grad_output.shape[2:],
                self.kernel,
                self.module.stride,
                padding,
                self.module.dilation,
                strict=True,
            )
        ]
        patches = patches.view(samples, *positions, self.matrix_shape[1])
        for dimension, size in enumerate(sizes):  # output_padding can make room for patches that no input feeds
            patches = patches.narrow(1 + dimension, 0, size)
        signal = patches.reshape(samples, math.prod(sizes), -1)
        rows = inputs.flatten(2).mT
        if self.reduce:
            rows, signal = rows.mean(1), signal.sum(1)
        else:
            rows, signal = rows.reshape(-1, channels), signal.flatten(0, 1)
        self.input_side.accumulate_(sums, rows)
        self.output_side.accumulate_(sums, signal)
        return Uses(samples, rows.shape[0])

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """The weight (in, out, *kernel); rows are kernel position first, channel last."""
        parts = matrix.view(*self.kernel, self.module.out_channels, self.module.in_channels)
        return {"weight": parts.movedim((-1, -2), (0, 1))}

    def present(self, name: str, factor: Tensor) -> Tensor:
        """G in the order of `weight[0].flatten()` if whole."""
        side = self.input_side if name[0] == "A" else self.output_side
        if name == "G" and not side.note:
            factor = factor[:, self.weight_order][:, :, self.weight_order]
        return side.present(factor)


def conv_transpose_rule(module: _ConvTransposeNd, params: Mapping[str, Parameter], options: LayerOptions) -> Rule | str:
    """The rule of `torch.nn.ConvTranspose1d/2d/3d`, or why there is none."""
    if module.groups > 1:
        return "no block for transposed convolutions with groups"
    return ConvTransposeRule(module, params, options)
