"""Embeddings: a linear layer on one-hot inputs, whose A is the diagonal of token frequencies."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Embedding, Parameter

from triton_curv.blocks.options import LayerOptions
from triton_curv.blocks.rows import RowsSource
from triton_curv.blocks.rule import Uses
from triton_curv.blocks.side import Side


def one_hot_counts(tokens: Tensor, weights: Tensor, size: int) -> Tensor:
    """How often each of `size` tokens occurs, (size,). Sums of ones are exact, so their order does not matter."""
    return weights.new_zeros(size).index_add_(0, tokens, weights)


class EmbeddingRule(RowsSource):
    """Kronecker factors of `torch.nn.Embedding`: A = diag(frequency of each token), G = E[g g^T].

    Exactly `DenseRule` on one-hot vectors, without them: A is diagonal, and a row of the weight whose token did not
    occur has a zero gradient and a zero preconditioned gradient. Tokens equal to `padding_idx` take no part. G has one
    row for each token, as with `weight_sharing="expand"`.

    Tokens (positions,) or (1, positions) beside a batch of N samples are those of all samples, and their gradients are
    means over them. Then G = N E[g g^T] with the N of the other layers: what it would be of single samples, if their
    gradients were uncorrelated.
    """

    def __init__(self, module: Embedding, params: Mapping[str, Parameter], options: LayerOptions | None = None) -> None:
        self.module = module
        self.params = params
        self.options = options or LayerOptions()
        self.has_bias = False
        self.vocabulary, self.width = module.weight.shape
        self.padding_idx = module.padding_idx
        self.input_side = Side.of("A", self.vocabulary, self.options.max_factor_dim, diagonal=True)
        self.output_side = Side.of("G", self.width, self.options.max_factor_dim)
        self.factor_shapes = {**self.input_side.shapes, **self.output_side.shapes}
        self.matrix_shape = (1, self.width, self.vocabulary)
        self.approximation = "Kronecker, A the diagonal of token frequencies (exact)" + (
            f"; {self.output_side.note}" if self.output_side.note else ""
        )

    def fits(self, mask: Tensor, inputs: Tensor) -> bool:
        """Whether there is a token at each of its places."""
        return mask.shape == inputs.shape

    def token_rows(self, inputs: Tensor, grad_output: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (k,), their weights 0 or 1 (k,), and signals (k, width), zero where the weight has no gradient."""
        signal = grad_output.reshape(inputs.numel(), self.width)
        tokens = inputs.reshape(-1)
        weights = torch.ones_like(tokens, dtype=signal.dtype)
        if mask is not None and mask.shape == inputs.shape:
            weights = mask.reshape(-1).to(signal.dtype)
        if self.padding_idx is not None:
            real = tokens != self.padding_idx
            weights, signal = weights * real, signal * real[:, None]
        return tokens, weights, signal

    def samples(self, inputs: Tensor) -> int:
        """Samples of one call with inputs (), (samples,) or (samples, positions...)."""
        return inputs.shape[self.options.batch_dim if inputs.dim() > 1 else 0] if inputs.dim() else 1

    def accumulate_masked_(
        self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, mask: Tensor | None
    ) -> Uses:
        """A += counts of tokens, G += g^T g over tokens."""
        tokens, weights, signal = self.token_rows(inputs, grad_output, mask)
        weights = weights.to(sums["A"].dtype)
        sums["A"].view(-1).add_(one_hot_counts(tokens, weights, self.vocabulary))
        self.output_side.accumulate_(sums, signal)
        shared = inputs.dim() < 2 or self.samples(inputs) == 1
        return Uses(self.samples(inputs), weights.sum().clamp_min(1), shared)

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """The weight (vocabulary, width), transposed."""
        return {"weight": matrix[0].T}

    def present(self, name: str, factor: Tensor) -> Tensor:
        """A as the vector of its diagonal; G (width, width)."""
        return (self.input_side if name[0] == "A" else self.output_side).present(factor)
