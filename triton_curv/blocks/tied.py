"""One weight in several layers: its gradient is the sum over the uses, and so are the statistics."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from triton_curv.blocks.embedding import EmbeddingRule, one_hot_counts
from triton_curv.blocks.options import LayerOptions
from triton_curv.blocks.rows import RowsSource, rows_of
from triton_curv.blocks.rule import Rule, Source, Uses
from triton_curv.blocks.side import Side


class TiedRule:
    """Layers of one kind with the same weight: as one layer that is called once for each of them."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        first = rules[0]
        self.first = first
        self.module = first.module
        self.params = first.params
        self.factor_shapes = first.factor_shapes
        self.matrix_shape = first.matrix_shape
        self.members: list[tuple[Module, Source]] = [(rule.module, rule) for rule in rules]
        self.approximation = f"{first.approximation}; {len(rules)} layers share it, A averaged and G summed over them"

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """As in the first layer."""
        return self.first.accumulate_(sums, inputs, grad_output, training)

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """As in the first layer."""
        return self.first.views(matrix)

    def present(self, name: str, factor: Tensor) -> Tensor:
        """As in the first layer."""
        return self.first.present(name, factor)


class HeadUse(RowsSource):
    """The use of a tied weight as y = W a: t = (tr A)(tr G), A/tr A and G/tr G weighted by t."""

    def __init__(self, options: LayerOptions) -> None:
        self.options = options
        self.has_bias = False

    def accumulate_masked_(
        self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, mask: Tensor | None
    ) -> Uses:
        """A += (tr G) A', G += (tr A') diag G, count t, for A' = a^T a / rows."""
        rows = rows_of(inputs, grad_output, False, self.options, mask)
        samples, used, _ = rows.uses
        a, dtype = rows.inputs.to(sums["A"].dtype), sums["A"].dtype
        squares = torch.linalg.vector_norm(rows.signal, dim=0, dtype=dtype).square()
        trace_A, trace_G = a.square().sum() / used, squares.sum()
        input_side = Side.of("A", a.shape[1], a.shape[1])
        input_side.accumulate_(sums, a * (trace_G / used).sqrt())
        sums["G"].view(-1).addcmul_(squares, trace_A)
        return Uses(samples, (trace_A * trace_G).clamp_min(torch.finfo(dtype).tiny))


class EmbeddingUse(RowsSource):
    """The use of a tied weight as an embedding: its A, the token frequencies, has trace 1."""

    def __init__(self, rule: EmbeddingRule) -> None:
        self.rule = rule

    def fits(self, mask: Tensor, inputs: Tensor) -> bool:
        """As the embedding alone."""
        return self.rule.fits(mask, inputs)

    def accumulate_masked_(
        self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, mask: Tensor | None
    ) -> Uses:
        """A += G', G += (tr G') frequencies, count t = tr G', for G' = g^T g."""
        tokens, weights, signal = self.rule.token_rows(inputs, grad_output, mask)
        dtype = sums["A"].dtype
        signal, weights = signal.to(dtype), weights.to(dtype)
        trace = signal.square().sum()
        Side.of("A", self.rule.width, self.rule.width).accumulate_(sums, signal)
        frequencies = one_hot_counts(tokens, weights, self.rule.vocabulary) / weights.sum().clamp_min(1)
        sums["G"].view(-1).addcmul_(frequencies, trace)
        return Uses(self.rule.samples(inputs), trace.clamp_min(torch.finfo(dtype).tiny))


class TiedEmbeddingRule:
    """A weight (vocabulary, width) that is an embedding and the head of the net: one Kronecker product for both.

    The curvature is F_1 + F_2, each V_i (x) W_i: V over the vocabulary (token frequencies; the head's G, of which the
    diagonal is kept) and W over the width (the embedding's G; the head's A). It is approximated by one product,
    (sum_i t_i) (sum_i w_i V_i / tr V_i) (x) (sum_i w_i W_i / tr W_i), t_i = tr F_i, w_i = t_i / sum t: right in its
    trace, exact if one use dominates or if both agree on one side; terms between the uses are dropped.
    "G" is the vocabulary's factor, "A", of trace 1, the width's.
    """

    def __init__(
        self,
        embedding: EmbeddingRule,
        heads: Sequence[Module],
        params: Mapping[str, Parameter],
        options: LayerOptions,
    ) -> None:
        self.module = embedding.module
        self.params = params
        self.vocabulary, self.width = embedding.vocabulary, embedding.width
        self.input_side = Side.of("A", self.width, self.width)
        self.output_side = Side.of("G", self.vocabulary, self.vocabulary, diagonal=True)
        self.factor_shapes = {**self.input_side.shapes, **self.output_side.shapes}
        self.matrix_shape = (1, self.vocabulary, self.width)
        head = HeadUse(options)
        self.embedding = EmbeddingUse(embedding)
        self.members: list[tuple[Module, Source]] = [(self.module, self.embedding), *((m, head) for m in heads)]
        self.approximation = "one Kronecker product for embedding and head, the vocabulary's side diagonal"

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """As in the embedding."""
        return self.embedding.accumulate_(sums, inputs, grad_output, training)

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """The weight (vocabulary, width)."""
        return {"weight": matrix[0]}

    def present(self, name: str, factor: Tensor) -> Tensor:
        """A (width, width); G as the vector of its diagonal."""
        return (self.input_side if name == "A" else self.output_side).present(factor)
