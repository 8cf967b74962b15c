"""Convolutions on explicit rows: `reduce` weight sharing, and factors that are too large to keep whole."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.conv import _ConvNd

from triton_curv.blocks.conv import ConvRule
from triton_curv.blocks.options import LayerOptions
from triton_curv.blocks.patches import patch_rows
from triton_curv.blocks.rows import notes
from triton_curv.blocks.rule import Rule, Uses
from triton_curv.blocks.side import Side


class ConvRowsRule(ConvRule):
    """`ConvRule` whose rows are whole samples (`reduce`) or whose factors are split or diagonal.

    A split factor's coordinates are in the order of `weight.flatten(1)`, as a whole one's.
    """

    def __init__(self, module: _ConvNd, params: Mapping[str, Parameter], options: LayerOptions) -> None:
        super().__init__(module, params)
        groups, rows, columns = self.matrix_shape
        self.reduce = options.weight_sharing == "reduce"
        self.input_side = Side.of("A", columns, options.max_factor_dim, groups)
        self.output_side = Side.of("G", rows, options.max_factor_dim, groups)
        self.factor_shapes = {**self.input_side.shapes, **self.output_side.shapes}
        self.approximation += notes(options, self.input_side, self.output_side)

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """A += patches^T patches and G += g^T g over positions, or over samples with both combined first."""
        if inputs.dim() == len(self.module.kernel_size) + 1:
            inputs, grad_output = inputs[None], grad_output[None]
        groups, per_group, _ = self.matrix_shape
        samples = inputs.shape[0]
        patches = patch_rows(self.module, inputs).view(groups, samples, -1, self.fan_in)
        signal = grad_output.reshape(samples, groups, per_group, -1).permute(1, 0, 3, 2)
        if self.reduce:
            patches, signal = patches.mean(2), signal.sum(2)
        else:
            patches, signal = patches.flatten(1, 2), signal.flatten(1, 2)
        self.input_side.accumulate_(sums, patches[..., self.weight_order[: self.fan_in]], self.has_bias)
        self.output_side.accumulate_(sums, signal)
        return Uses(samples, patches.shape[1])

    def present(self, name: str, factor: Tensor) -> Tensor:
        """As `ConvRule` for a whole factor; (blocks, n, n) or (n,) otherwise, after the groups if there are several."""
        side = self.input_side if name[0] == "A" else self.output_side
        return side.present(factor) if side.note else super().present(name, factor)


def conv_rule(module: _ConvNd, params: Mapping[str, Parameter], options: LayerOptions) -> Rule:
    """The rule of `torch.nn.Conv1d/2d/3d`: `ConvRule` where that is enough."""
    rule = ConvRule(module, params, options.conv_samples)
    large = max(rule.matrix_shape[1:]) > options.max_factor_dim
    return ConvRowsRule(module, params, options) if large or options.weight_sharing == "reduce" else rule
