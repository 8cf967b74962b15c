"""One weight in several layers: its gradient is the sum over the uses, and so are the statistics."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from triton_curv.blocks.embedding import EmbeddingRule
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
    """The use of a tied weight as y = W a."""

    def __init__(self, options: LayerOptions) -> None:
        self.options = options
        self.has_bias = False

    def accumulate_masked_(
        self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, mask: Tensor | None
    ) -> Uses:
        """A += sum_r |g_r|^2 a_r a_r^T, G += sum_r |a_r|^2 diag(g_r g_r^T), count t, over rows r."""
        rows = rows_of(inputs, grad_output, False, self.options, mask)
        a, dtype = rows.inputs.to(sums["A"].dtype), sums["A"].dtype
        of_signals = torch.linalg.vector_norm(rows.signal, dim=1, dtype=dtype)
        of_inputs = torch.linalg.vector_norm(a, dim=1)
        Side.of("A", a.shape[1], a.shape[1]).accumulate_(sums, a * of_signals[:, None])
        sums["G"].view(-1).add_(torch.linalg.vector_norm(rows.signal * of_inputs[:, None], dim=0).square_())
        return Uses(rows.uses.samples, (of_signals * of_inputs).square().sum().clamp_min(torch.finfo(dtype).tiny))


class EmbeddingUse(RowsSource):
    """The use of a tied weight as an embedding: y = W^T v of one-hot vectors v."""

    def __init__(self, rule: EmbeddingRule) -> None:
        self.rule = rule

    def fits(self, mask: Tensor, inputs: Tensor) -> bool:
        """As the embedding alone."""
        return self.rule.fits(mask, inputs)

    def accumulate_masked_(
        self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, mask: Tensor | None
    ) -> Uses:
        """A += sum_r g_r g_r^T, G += sum_r |g_r|^2 v_r v_r^T, count t, over tokens r."""
        tokens, _, signal = self.rule.token_rows(inputs, grad_output, mask)
        signal = signal.to(sums["A"].dtype)
        sizes = signal.square().sum(1, keepdim=True)
        Side.of("A", self.rule.width, self.rule.width).accumulate_(sums, signal)
        # what `index_add_` does, in a fixed order on a GPU too
        by_token = torch.ops.aten.embedding_dense_backward(sizes, tokens, self.rule.vocabulary, -1, False)
        sums["G"].view(-1).add_(by_token[:, 0])
        return Uses(self.rule.samples(inputs), sizes.sum().clamp_min(torch.finfo(signal.dtype).tiny))


class TiedEmbeddingRule:
    """A weight (vocabulary, width) that is an embedding and the head of the net: one Kronecker product for both.

    The curvature is F = sum over uses and rows of V_r (x) W_r: V over the vocabulary (one-hot tokens; the head's
    signals) and W over the width (the embedding's signals; the head's inputs). It is approximated by one product,
    t (V / tr V) (x) (W / tr W), of the partial traces V = sum_r V_r tr W_r, of which the diagonal is kept, and
    W = sum_r W_r tr V_r, t = tr F: right in its trace, exact where F is such a product. All are sums over rows, so that
    a batch may come in parts; terms between uses and between positions are dropped.
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
