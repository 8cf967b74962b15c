"""P = (F + lambda I)^-1 D of one block as a function of the tensors that stand for its damped inverse."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_curv.blocks.side import times_left, times_right


class Operator(NamedTuple):
    """Damped inverses of G, or of the only factor, in `left`, those of A in `right`: each (batch, n, n).

    `whole`: one of each at most, not several diagonal blocks. With `gains`, (batch, rows, columns), both are
    eigenbases instead, and gains are 1 / (eigenvalues + lambda).
    """

    left: Sequence[Tensor]
    right: Sequence[Tensor]
    gains: Tensor | None
    whole: bool


def solve(operator: Operator, matrix: Tensor, out: Tensor) -> None:
    """out = G^-1 D A^-1, or F^-1 D, or Q_G (gains * Q_G^T D Q_A) Q_A^T; both (batch, rows, columns)."""
    left, right, gains, whole = operator
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
