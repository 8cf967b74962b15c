"""What a block costs, from its shapes: statistics of one call of its layer, inverses, preconditioning, memory."""

import math
from typing import NamedTuple

from torch import Tensor

from triton_curv.blocks.conv import ConvRule
from triton_curv.blocks.conv_transpose import ConvTransposeRule
from triton_curv.blocks.embedding import EmbeddingRule
from triton_curv.blocks.rule import Rule
from triton_curv.blocks.tied import TiedEmbeddingRule
from triton_curv.costs import NOTHING, Cost, factor_cost, inverse_cost

# FLOPs that take as long as one byte moved: of products, between 18 (H100, float32) and 120 (in TF32), about 100 on a
# CPU core with rows in memory; of Cholesky inverses of some hundred rows on a CPU core
FLOPS_A_BYTE = 64
INVERSION_FLOPS_A_BYTE = 16


class StatisticsCost(NamedTuple):
    """Cost of the input factor A, and of the gradient factor G or the single factor F."""

    inputs: Cost
    gradients: Cost


def rows_of_call(rule: Rule, inputs: Tensor, grad_output: Tensor) -> int:
    """Vectors whose outer products one call adds to a factor: positions of all samples, samples for a norm layer."""
    batch, height, width = rule.matrix_shape
    if "F" in rule.factor_shapes:
        return inputs.shape[0] if inputs.dim() else 1
    if isinstance(rule, EmbeddingRule | TiedEmbeddingRule) and not inputs.is_floating_point():
        return inputs.numel()
    if isinstance(rule, ConvTransposeRule | TiedEmbeddingRule):
        return inputs.numel() // width
    return grad_output.numel() // (batch * height)


def statistics_cost(rule: Rule, inputs: Tensor, grad_output: Tensor) -> StatisticsCost:
    """Cost of adding one call's statistics, explicit rows of 4-byte numbers; shapes alone are read."""
    rows = rows_of_call(rule, inputs, grad_output)
    of_inputs = of_gradients = NOTHING
    for name, shape in rule.factor_shapes.items():
        counted = isinstance(rule, EmbeddingRule) and name[0] == "A"  # token frequencies
        cost = Cost(rows, 8 * rows) if counted else factor_cost(rows, shape.size, shape.batch)
        if name[0] == "A":
            of_inputs += cost
        else:
            of_gradients += cost
    return StatisticsCost(of_inputs, of_gradients)


def statistics_work(rule: Rule, inputs: Tensor, grad_output: Tensor) -> float:
    """How long one call's statistics take, in bytes moved, to compare layers by; proportional to the batch size."""
    rows = rows_of_call(rule, inputs, grad_output)
    work = float(inputs.numel() * inputs.element_size() + grad_output.numel() * grad_output.element_size())
    for name, shape in rule.factor_shapes.items():
        counted = isinstance(rule, EmbeddingRule) and name[0] == "A"
        taken = rule.share_taken(inputs.shape[0], rows) if isinstance(rule, ConvRule) and name[0] == "A" else 1.0
        of_row = shape.batch * shape.size * (4 + (shape.size + 1) / FLOPS_A_BYTE)
        work += taken * rows * (8 if counted else of_row)
    return work


def inversion_work(rule: Rule) -> float:
    """How long renewing all inverses of a block takes, in the unit of `statistics_work`."""
    cost = inversion_cost(rule)
    return cost.bytes + cost.flops / INVERSION_FLOPS_A_BYTE


def inversion_cost(rule: Rule) -> Cost:
    """Cost of renewing all inverses of a block once, by Cholesky."""
    return sum((inverse_cost(shape.size, shape.batch) for shape in rule.factor_shapes.values()), NOTHING)


def solve_cost(rule: Rule) -> Cost:
    """Cost of one P = G^-1 D A^-1, or F^-1 D: inverses and D read, P written."""
    batch, height, width = rule.matrix_shape
    flops = moved = 0
    for name, shape in rule.factor_shapes.items():
        across = height if name[0] == "A" else width
        flops += 2 * shape.batch * shape.size**2 * across
        moved += shape.batch * shape.size**2
    return Cost(flops, 4 * (moved + 2 * batch * height * width))


def numbers_of(rule: Rule) -> int:
    """Trained scalars of a block."""
    return sum(math.prod(p.shape) for p in rule.params.values())
