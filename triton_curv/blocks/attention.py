"""The input projections of `torch.nn.MultiheadAttention`: one pair (A, G) each for queries, keys and values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import MultiheadAttention, Parameter

from triton_curv.blocks.options import LayerOptions
from triton_curv.blocks.products import add_product_
from triton_curv.blocks.rows import RowsSource, mask_fits, notes, rows_of, samples_first
from triton_curv.blocks.rule import FactorShape, MaskedSource, Rule, Source, Uses
from triton_curv.blocks.side import Side

ROLES = ("q", "k", "v")


class AttentionRule(Protocol):
    """A rule for parameters that several projections share: each brings the statistics of its part."""

    sources: Mapping[str, Source]


@dataclass(frozen=True)
class ProjectionPart(MaskedSource):
    """Part number `index` of three: its A and G are those of a linear layer of its own.

    Keys can be more than queries, but a block has one count of rows: what a call adds to A is divided by its rows and
    multiplied by its samples, and samples take the place of rows. Queries do the counting for all three.
    """

    index: int
    has_bias: bool
    options: LayerOptions
    input_side: Side
    output_side: Side
    mask: Tensor | None = None

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """A += (samples / rows) a^T a and G += g^T g."""
        own = {key: total.unflatten(0, (len(ROLES), -1))[self.index] for key, total in sums.items()}
        rows = rows_of(inputs, grad_output, self.has_bias, self.options, self.mask)
        samples, used, _ = rows.uses
        if isinstance(used, Tensor):
            share = samples / used.to(torch.promote_types(rows.inputs.dtype, torch.float32))
            self.input_side.accumulate_(own, rows.inputs * share.sqrt(), rows.ones)
        else:
            self.input_side.accumulate_(own, rows.inputs, rows.ones, samples / max(used, 1))
        self.output_side.accumulate_(own, rows.signal)
        return Uses(samples, samples) if self.index == 0 else Uses(0, 0)

    def fits(self, mask: Tensor, inputs: Tensor) -> bool:
        """Whether there is an input at each of its places."""
        return mask_fits(mask, inputs, self.options)

    def masked(self, mask: Tensor) -> Source:
        """The same part with a mask."""
        return replace(self, mask=mask)


def accumulate_parts_(
    sources: Mapping[str, Source], sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool
) -> Uses:
    """All parts of a self-attention, from its input (time, samples, d) and the signal (time, samples, 3 d)."""
    samples = rows = 0
    for source, signal in zip(sources.values(), grad_output.chunk(len(ROLES), -1), strict=True):
        uses = source.accumulate_(sums, inputs, signal, training)
        samples, rows = samples + uses.samples, rows + int(uses.rows)
    return Uses(samples, rows)


class InProjectionRule:
    """`in_proj_weight` and `in_proj_bias`: three linear layers, as `groups` of a convolution are layers of their own.

    Right for self-attention and for cross-attention, whose inputs differ. Positions count as for a linear layer.
    """

    def __init__(self, module: MultiheadAttention, params: Mapping[str, Parameter], options: LayerOptions) -> None:
        self.module = module
        self.params = {name: params[name] for name in ("in_proj_weight", "in_proj_bias") if name in params}
        self.has_bias = "in_proj_bias" in params
        d = module.embed_dim
        self.input_side = Side.of("A", d + self.has_bias, options.max_factor_dim, len(ROLES))
        self.output_side = Side.of("G", d, options.max_factor_dim, len(ROLES))
        self.factor_shapes = {**self.input_side.shapes, **self.output_side.shapes}
        self.matrix_shape = (len(ROLES), d, d + self.has_bias)
        own = (replace(self.input_side, groups=1), replace(self.output_side, groups=1))
        self.sources: Mapping[str, Source] = {
            role: ProjectionPart(i, self.has_bias, options, *own) for i, role in enumerate(ROLES)
        }
        self.approximation = "Kronecker for each of q, k, v" + notes(options, self.input_side, self.output_side)

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """Self-attention: inputs (time, samples, d), grad_output (time, samples, 3 d)."""
        return accumulate_parts_(self.sources, sums, inputs, grad_output, training)

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Weight (3 d, d): all columns but the bias's; bias (3 d,): the last column."""
        rows = matrix.view(-1, matrix.shape[-1])
        parts = {"in_proj_weight": rows[:, : self.module.embed_dim]}
        if self.has_bias:
            parts["in_proj_bias"] = rows[:, -1]
        return parts

    def present(self, name: str, factor: Tensor) -> Tensor:
        """(3, n, n), in the order q, k, v; (3, blocks, n, n) if split, (3, n) if diagonal."""
        return (self.input_side if name[0] == "A" else self.output_side).present(factor)


class ProjectionRule(RowsSource):
    """The weight `q_proj_weight`, `k_proj_weight` or `v_proj_weight` of an attention with `kdim` or `vdim`."""

    def __init__(self, module: MultiheadAttention, params: Mapping[str, Parameter], options: LayerOptions) -> None:
        self.module = module
        self.params = params
        self.options = options
        self.has_bias = False
        ((self.weight_name, weight),) = params.items()
        rows, columns = weight.shape
        self.input_side, self.output_side = (
            Side.of("A", columns, options.max_factor_dim),
            Side.of("G", rows, options.max_factor_dim),
        )
        self.factor_shapes = {**self.input_side.shapes, **self.output_side.shapes}
        self.matrix_shape = (1, rows, columns)
        self.sources: Mapping[str, Source] = {self.weight_name[0]: self}
        self.approximation = "Kronecker; the bias apart" + notes(options, self.input_side, self.output_side)

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """The weight."""
        return {self.weight_name: matrix[0]}

    def present(self, name: str, factor: Tensor) -> Tensor:
        """Whole (n, n), split (blocks, n, n), diagonal (n,)."""
        return (self.input_side if name[0] == "A" else self.output_side).present(factor)


@dataclass(frozen=True)
class BiasPart:
    """A third of the bias: F += v v^T, v the sum of g over a sample's positions."""

    index: int
    options: LayerOptions

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """F[index] += sum_n v_n v_n^T."""
        signal = samples_first(grad_output, self.options.batch_dim)
        samples, *positions, width = signal.shape
        vectors = signal.reshape(samples, math.prod(positions), width).sum(1)
        add_product_(sums["F"][self.index], vectors)
        return Uses(samples, samples) if self.index == 0 else Uses(0, 0)


class InProjectionBiasRule:
    """`in_proj_bias` of an attention with `kdim` or `vdim`: the Fisher of each third, exact."""

    def __init__(self, module: MultiheadAttention, params: Mapping[str, Parameter], options: LayerOptions) -> None:
        self.module = module
        self.params = params
        d = module.embed_dim
        self.factor_shapes = {"F": FactorShape(len(ROLES), d)}
        self.matrix_shape = (len(ROLES), d, 1)
        self.sources: Mapping[str, Source] = {role: BiasPart(i, options) for i, role in enumerate(ROLES)}
        self.approximation = "empirical Fisher for each of q, k, v, exact"

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """grad_output (time, samples, 3 d)."""
        return accumulate_parts_(self.sources, sums, inputs, grad_output, training)

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """The bias (3 d,)."""
        return {"in_proj_bias": matrix.view(-1)}

    def present(self, name: str, factor: Tensor) -> Tensor:
        """(3, d, d), in the order q, k, v."""
        return factor


def attention_rules(
    module: MultiheadAttention, params: Mapping[str, Parameter], options: LayerOptions
) -> dict[str, Rule]:
    """Rules of the input projections by the ending of the block's name: one, "", or one for each parameter."""
    options = replace(options, batch_dim=1)  # inside the attention, inputs are (time, samples, features)
    if "in_proj_weight" in params:
        return {"": InProjectionRule(module, params, options)}
    rules: dict[str, Rule] = {
        f".{role}_proj": ProjectionRule(module, {name: params[name]}, options)
        for role in ROLES
        if (name := f"{role}_proj_weight") in params
    }
    if "in_proj_bias" in params and module.in_proj_weight is None and module.embed_dim <= options.max_factor_dim:
        rules[".in_proj_bias"] = InProjectionBiasRule(module, {"in_proj_bias": params["in_proj_bias"]}, options)
    return rules
