"""P = (F + lambda I)^-1 D of one block as a function of the tensors that stand for its damped inverse."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_curv.blocks.low_rank import LowRank, times_left_, times_right_
from triton_curv.blocks.side import times_left, times_left_into, times_right
from triton_curv.costs import Cost
from triton_curv_kernels import apply_damped_inverse
from triton_curv_kernels.backend import use_reference


class Forms(NamedTuple):
    """Low-rank forms that stand for the damped inverse of G, of A; None where the dense one is used."""

    left: LowRank | None
    right: LowRank | None


class Operator(NamedTuple):
    """Damped inverses of G, or of the only factor, in `left`, those of A in `right`: each (batch, n, n).

    `whole`: one of each at most, not several diagonal blocks. With `gains`, (batch, rows, columns), both are
    eigenbases instead, and gains are 1 / (eigenvalues + lambda). With `forms`, what lies in `left` or `right` of the
    factor is not its inverse.
    """

    left: Sequence[Tensor]
    right: Sequence[Tensor]
    gains: Tensor | None
    whole: bool
    forms: Forms | None = None


def solving_cost(operator: Operator, matrix: Tensor) -> Cost:
    """Of `solve`: each factor times what it faces; factors and D read, P written."""
    batch, rows, columns = matrix.shape
    flops = moved = 0
    forms = operator.forms or Forms(None, None)
    for factors, form, across in ((operator.left, forms.left, columns), (operator.right, forms.right, rows)):
        if form is not None:
            flops += 4 * form.basis.numel() * across
            moved += form.basis.numel()
            continue
        for factor in factors:
            flops += 2 * factor.numel() * across
            moved += factor.numel()
    if operator.gains is not None:
        flops, moved = 2 * flops, moved + operator.gains.numel()
    return Cost(flops, (moved + 2 * batch * rows * columns) * matrix.element_size())


def solved(operator: Operator, matrix: Tensor) -> Tensor:
    """G^-1 D A^-1, or F^-1 D, or Q_G (gains * Q_G^T D Q_A) Q_A^T, (batch, rows, columns)."""
    left, right, gains, whole, forms = operator
    if forms is not None:
        out = torch.empty_like(matrix)
        solve(operator, matrix, out)
        return out
    if not whole:
        return times_right(times_left(left, matrix), right)
    of_G, of_A = left[0], right[0] if right else None
    one = len(matrix) == 1  # matrices alone: products of batches of one cost more
    if one:
        matrix, of_G = matrix[0], of_G[0]
        of_A, gains = (None if t is None else t[0] for t in (of_A, gains))
    if of_A is None:
        result = of_G @ matrix
    elif gains is None:
        result = of_G @ matrix @ of_A
    else:
        result = of_G @ (of_G.mT @ matrix @ of_A * gains) @ of_A.mT
    return result[None] if one else result


def solves_in_place(operator: Operator) -> bool:
    """Whether `solve` takes the same tensor for D and P: A in a low-rank form, and G so or diagonal."""
    left, _, _, _, forms = operator
    if forms is None or forms.right is None:
        return False
    return forms.left is not None or not left or (len(left) == 1 and left[0].shape[-1] == 1)


def solve(operator: Operator, matrix: Tensor, out: Tensor) -> None:
    """out = `solved(operator, matrix)`; `matrix` may be `out` where `solves_in_place` says so."""
    left, right, gains, whole, forms = operator
    if forms is not None:
        if forms.right is not None:
            times_left_into(() if forms.left is not None else left, matrix, out)
            times_right_(out[0], forms.right)
        else:
            out.copy_(times_right(matrix if forms.left is not None else times_left(left, matrix), right))
        if forms.left is not None:
            times_left_(forms.left, out[0])
        return
    if not whole:
        out.copy_(times_right(times_left(left, matrix), right))
        return
    of_G, of_A = left[0], right[0] if right else None
    if len(matrix) == 1:
        matrix, out, of_G = matrix[0], out[0], of_G[0]
        of_A, gains = (None if t is None else t[0] for t in (of_A, gains))
    if of_A is None:
        torch.matmul(of_G, matrix, out=out)
    elif gains is None:
        torch.matmul(of_G @ matrix, of_A, out=out)
    else:
        torch.matmul(of_G @ (of_G.mT @ matrix @ of_A).mul_(gains), of_A.mT, out=out)


class Sums(NamedTuple):
    """<P, D> and ||P||^2 of each block, (blocks,)."""

    products: Tensor
    squares: Tensor


def solve_all(operators: Sequence[Operator], matrices: Sequence[Tensor], outs: Sequence[Tensor]) -> Sums | None:
    """`solve` for each block; where kernels run, three launches for all blocks of whole factors, with their sums.

    None if there is a block without sums.
    """
    whole = [each.whole and each.gains is None for each in operators]
    if not any(whole) or not has_kernels(matrices[0]):
        whole = [False] * len(operators)
    for operator, matrix, out, is_whole in zip(operators, matrices, outs, whole, strict=True):
        if not is_whole:
            solve(operator, matrix, out)
    together = [i for i, is_whole in enumerate(whole) if is_whole]
    if not together:
        return None
    applied = apply_damped_inverse(
        [outs[i] for i in together],
        [matrices[i] for i in together],
        [operators[i].right[0] if operators[i].right else matrices[i].new_empty(0) for i in together],
        [operators[i].left[0] for i in together],
    )
    return Sums(applied.products, applied.squares) if all(whole) else None


def has_kernels(tensor: Tensor) -> bool:
    """Whether kernels serve the tensor's device. A trace does not look at the environment: there, on a GPU."""
    return tensor.device.type != "cpu" if torch.compiler.is_compiling() else not use_reference(tensor)
