"""Linear layers: A = E[a a^T], G = E[g g^T]."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import Module, Parameter

from triton_curv.blocks.options import LayerOptions
from triton_curv.blocks.rows import RowsSource, notes
from triton_curv.blocks.side import Side


class DenseRule(RowsSource):
    """Kronecker factors of `torch.nn.Linear`; the bias is one more input that is always 1.

    Inputs (d_in,), (samples, d_in) or (samples, positions..., d_in). Positions share the weight: with `expand` A
    averages over them and G sums over them; with `reduce` A is made of inputs averaged and G of gradients summed over
    a sample's positions. Source: arXiv 1811.12019 section 3, arXiv 2311.00636 for weight sharing.
    """

    def __init__(self, module: Module, params: Mapping[str, Parameter], options: LayerOptions | None = None) -> None:
        self.module = module
        self.params = params
        self.options = options or LayerOptions()
        self.has_bias = "bias" in params
        self.fan_out, self.fan_in = self.widths(params["weight"])
        columns, limit = self.fan_in + self.has_bias, self.options.max_factor_dim
        wide = self.fan_out > self.options.max_output_dim
        self.input_side = Side.of("A", columns, limit)
        self.output_side = Side.of("G", self.fan_out, limit, diagonal=wide)
        self.factor_shapes = {**self.input_side.shapes, **self.output_side.shapes}
        self.matrix_shape = (1, self.fan_out, columns)
        exact = "Kronecker; exact for one datum and for deep linear nets"
        self.approximation = exact + notes(self.options, self.input_side, self.output_side)

    def widths(self, weight: Tensor) -> tuple[int, int]:
        """(d_out, d_in) of a weight."""
        return weight.shape[0], weight.shape[1]

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Weight: all columns but the bias's; bias: the last column."""
        parts = {"weight": matrix[0, :, : self.fan_in]}
        if self.has_bias:
            parts["bias"] = matrix[0, :, -1]
        return parts

    def present(self, name: str, factor: Tensor) -> Tensor:
        """Whole (n, n), split (blocks, n, n), diagonal (n,)."""
        return (self.input_side if name[0] == "A" else self.output_side).present(factor)


class TransposedDenseRule(DenseRule):
    """`DenseRule` for layers y = a W + b that keep W as (d_in, d_out): `transformers.pytorch_utils.Conv1D`."""

    def widths(self, weight: Tensor) -> tuple[int, int]:
        """(d_out, d_in) of a weight."""
        return weight.shape[1], weight.shape[0]

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """As for a linear layer, the weight transposed."""
        parts = super().views(matrix)
        return {**parts, "weight": parts["weight"].T}
