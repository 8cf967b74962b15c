"""Convolutions: A = E[mean over positions of patch patch^T], G = E[sum over positions of g g^T], per group."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.conv import _ConvNd

from triton_curv.blocks.products import add_product_, waiting
from triton_curv.blocks.rule import FactorShape, Uses
from triton_curv.costs import NOTHING, Cost, factor_cost, triangle
from triton_curv.nvtx import stage
from triton_curv_kernels import accumulate_patch_factor_

ROWS_A_COLUMN = 4  # patches that A is taken from, for each of its coordinates


def patch_cost(total: Tensor, inputs: Tensor, rows: int) -> Cost:
    """Of A += patches^T patches, (groups, n, n), without patches in memory: inputs read, A read and written."""
    groups, n, _ = total.shape
    return Cost(
        factor_cost(rows, n, groups).flops,
        inputs.numel() * inputs.element_size() + 2 * groups * triangle(n) * total.element_size(),
    )


def signal_cost(total: Tensor, grad_output: Tensor) -> Cost:
    """Of G += g^T g, (groups, n, n), if that is done at once."""
    return NOTHING if waiting() else factor_cost(grad_output[:, 0].numel(), total.shape[-1], len(total))


class ConvRule:
    """Kronecker factors of `torch.nn.Conv1d/2d/3d`, one pair (A, G) for each group.

    All strides, dilations, paddings (also 'same', reflect, replicate, circular) and groups.
    Source: KFC, arXiv 1602.01407; normalisation as in arXiv 2002.06015 section 3 (1/T on A).
    """

    def __init__(self, module: _ConvNd, params: Mapping[str, Parameter], conv_samples: int = 0) -> None:
        self.module = module
        self.conv_samples = conv_samples
        self.params = params
        self.has_bias = "bias" in params
        self.fan_in = math.prod(module.weight.shape[1:])
        groups, rows = module.groups, module.out_channels // module.groups
        columns = self.fan_in + self.has_bias
        per_group, *kernel = module.weight.shape[1:]
        order = torch.arange(self.fan_in, device=module.weight.device).view(math.prod(kernel), per_group).T.flatten()
        self.weight_order = torch.cat([order, order.new_tensor([self.fan_in] * self.has_bias)])
        # patches come kernel position first, channel last; the factor is kept as `weight.flatten(1)` has it
        self.factor_shapes = {
            "A": FactorShape(groups, columns, order=self.weight_order),
            "G": FactorShape(groups, rows),
        }
        self.matrix_shape = (groups, rows, columns)
        self.approximation = "Kronecker per group; exact for one output position in deep linear nets"

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """A += patches^T patches, without patches, and G += g^T g over all samples and positions."""
        if inputs.dim() == len(self.module.kernel_size) + 1:
            inputs, grad_output = inputs[None], grad_output[None]
        rows = grad_output[:, 0].numel()
        samples = self._samples_taken(inputs.shape[0], rows)
        scale = inputs.shape[0] / samples if samples else 1.0
        self._accumulate_patches_(sums["A"], inputs[:samples], rows, scale)
        return Uses(samples=inputs.shape[0], rows=self._accumulate_signal_(sums["G"], grad_output))

    def _samples_taken(self, samples: int, rows: int) -> int:
        """How many samples of a batch, `rows` patches in all, A is taken from: see `LayerOptions.conv_samples`."""
        if not self.conv_samples or not rows:
            return samples
        return min(samples, max(self.conv_samples, -(-ROWS_A_COLUMN * self.matrix_shape[2] * samples // rows)))

    def share_taken(self, samples: int, rows: int) -> float:
        """The part of a batch that A is taken from."""
        return self._samples_taken(samples, rows) / samples if samples else 1.0

    @stage("factor A", payload=lambda rule, total, inputs, rows, scale: patch_cost(total, inputs, round(rows / scale)))
    def _accumulate_patches_(self, total: Tensor, inputs: Tensor, rows: int, scale: float) -> None:
        """A += scale patches^T patches; all samples together have `rows` of them for each group."""
        conv = self.module
        accumulate_patch_factor_(
            total,
            inputs,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            ones=self.has_bias,
            alpha=scale,
            padding_mode=conv.padding_mode,
        )

    @stage("factor G", payload=lambda rule, total, grad: signal_cost(total, grad))
    def _accumulate_signal_(self, total: Tensor, grad_output: Tensor) -> int:
        """G += g^T g; returns the rows of g for each group."""
        groups, per_group, _ = self.matrix_shape
        # (samples, groups * per_group, positions) -> (groups, samples * positions, per_group)
        signal = grad_output.reshape(grad_output.shape[0], groups, per_group, -1)
        signal = signal.permute(1, 0, 3, 2).reshape(groups, -1, per_group)
        if groups == 1:
            add_product_(total[0], signal[0])
        else:
            add_product_(total, signal)
        return signal.shape[1]

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Weight: all columns but the bias's; bias: the last column. Groups follow one another."""
        rows = matrix.view(self.module.out_channels, -1)
        parts = {"weight": rows[:, : self.fan_in].view(self.module.weight.shape)}
        if self.has_bias:
            parts["bias"] = rows[:, -1]
        return parts

    def present(self, name: str, factor: Tensor) -> Tensor:
        """(groups, n, n), A in the order of `weight.flatten(1)`; without the leading dimension for one group."""
        return factor[0] if self.module.groups == 1 else factor
