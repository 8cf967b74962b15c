"""Linear layers: A = E[a a^T], G = E[g g^T]."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import Linear, Parameter

from triton_curv.blocks.rule import FactorShape, Uses
from triton_curv_kernels import accumulate_factor_


class DenseRule:
    """Kronecker factors of `torch.nn.Linear`; the bias is one more input that is always 1.

    Inputs (d_in,), (samples, d_in) or (samples, positions..., d_in): positions share the weight, A averages over
    them and G sums over them (`expand`). Source: arXiv 1811.12019 section 3, arXiv 2311.00636 for weight sharing.
    """

    def __init__(self, module: Linear, params: Mapping[str, Parameter]) -> None:
        self.module = module
        self.params = params
        self.has_bias = "bias" in params
        columns = module.in_features + self.has_bias
        self.factor_shapes = {
            "A": FactorShape(1, columns),
            "G": FactorShape(1, module.out_features),
        }
        self.matrix_shape = (1, module.out_features, columns)
        self.approximation = "Kronecker; exact for one datum and for deep linear nets"

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """A += X^T X and G += g^T g over all rows."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        accumulate_factor_(sums["A"][0], rows, ones=self.has_bias)
        accumulate_factor_(sums["G"][0], grad_output.reshape(-1, grad_output.shape[-1]))
        return Uses(samples=inputs.shape[0] if inputs.dim() > 1 else 1, rows=rows.shape[0])

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Weight: all columns but the bias's; bias: the last column."""
        parts = {"weight": matrix[0, :, : self.module.in_features]}
        if self.has_bias:
            parts["bias"] = matrix[0, :, -1]
        return parts

    def present(self, name: str, factor: Tensor) -> Tensor:
        """(1, n, n) -> (n, n)."""
        return factor[0]
