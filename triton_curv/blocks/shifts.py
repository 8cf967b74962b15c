"""What damps each factor matrix: lambda of its block, split between A and G."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_curv.blocks.rule import FactorShape
from triton_curv.damping import kronecker_shifts
from triton_curv.hostcheck import known_true


class Members(NamedTuple):
    """Some rows, (members,), of vectors over factor matrices, their blocks, and how many a block has, (blocks,)."""

    rows: Tensor
    owner: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], owner: Tensor, like: Tensor) -> "Members":
        """`owner` of all rows; `like` is a vector over blocks."""
        index = torch.tensor(rows, dtype=torch.int64, device=owner.device)
        numbers = torch.zeros_like(like).index_add_(0, owner[index], like.new_ones(len(rows)))
        return cls(index, owner[index], numbers)

    def damping(self, means: Sequence[Tensor], damping: Tensor, relative: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """lambda of each, damping + relative * curvature, and the mean eigenvalues of A and G, or F, that go with it.

        Curvature is the mean of their product over the whole block, so that a dead group is damped. Where that leaves
        lambda 0 (a dead layer, an adapter whose other half is still 0) 1 stands for the means that are 0: else nothing
        would bound the step of its first gradient.
        """
        lambdas = self._lambdas(means, damping, relative)
        if known_true(lambdas > 0):
            return lambdas, means
        alive, dead = [torch.where(mean == 0, 1.0, mean) for mean in means], lambdas == 0
        lambdas = torch.where(dead, self._lambdas(alive, damping, relative), lambdas)
        return lambdas, [torch.where(dead, a, mean) for a, mean in zip(alive, means, strict=True)]

    def _lambdas(self, means: Sequence[Tensor], damping: Tensor, relative: Tensor) -> Tensor:
        curvature = math.prod(means[1:], start=means[0])
        total = torch.zeros_like(self.numbers).index_add_(0, self.owner, curvature)
        return (damping + relative * total / self.numbers)[self.owner]


class Shares:
    """Factors A and the G beside each (same block, same group), and lone factors F.

    The diagonal blocks of one factor are stood for by the first of them: `first_row` says which that is for each
    row, and there `dimensions` holds the size of the whole factor. `turned` rows have an eigenbasis.
    """

    def __init__(
        self,
        shapes: Sequence[Mapping[str, FactorShape]],
        start_of: Callable[[int, str], int],
        owner: Tensor,
        turned: Sequence[bool],
        like: Tensor,
    ) -> None:
        pairs: list[tuple[int, int]] = []
        single: list[int] = []
        first_row = list(range(len(owner)))
        sizes = [0] * len(owner)
        for block, factors in enumerate(shapes):
            first: dict[str, list[int]] = {}
            for name, shape in factors.items():
                start = start_of(block, name)
                heads = first.setdefault(name[0], list(range(start, start + shape.batch, shape.blocks)))
                for i in range(shape.batch):
                    first_row[start + i] = heads[i // shape.blocks]
                    sizes[start + i] = shape.size
            if "F" in first:
                single += first["F"]
            else:
                pairs += zip(first["A"], first["G"], strict=True)
        self.first_row = torch.tensor(first_row, dtype=torch.int64, device=owner.device)
        lengths = torch.tensor(sizes, dtype=like.dtype, device=owner.device)
        self.dimensions = torch.zeros_like(lengths).index_add_(0, self.first_row, lengths)
        self.A = Members.of([a for a, _ in pairs], owner, like)
        self.row_G = torch.tensor([g for _, g in pairs], dtype=torch.int64, device=owner.device)
        self.F = Members.of(single, owner, like)
        self.turned = torch.tensor([turned[a] for a, _ in pairs], device=owner.device) if any(turned) else None

    def shifts(self, traces: Tensor, damping: Tensor, relative: Tensor) -> Tensor:
        """What is added to each factor: lambda = damping + relative * mean eigenvalue, both per block, split by pi.

        For factors with an eigenbasis it is lambda itself, which is added to products of eigenvalues. `traces` are
        those of all rows.
        """
        means = torch.zeros_like(traces).index_add_(0, self.first_row, traces) / self.dimensions  # NaN if not first
        shifts = torch.empty_like(means)
        if len(self.row_G):
            of_pairs = (means[self.A.rows], means[self.row_G])
            damping_A, (mean_A, mean_G) = self.A.damping(of_pairs, damping, relative)
            split = kronecker_shifts(mean_A, mean_G, damping_A)
            if self.turned is not None:
                split = torch.where(self.turned, damping_A, split[0]), torch.where(self.turned, damping_A, split[1])
            shifts[self.A.rows], shifts[self.row_G] = split
        if len(self.F.rows):
            shifts[self.F.rows], _ = self.F.damping((means[self.F.rows],), damping, relative)
        least = torch.finfo(shifts.dtype).tiny ** 0.5  # for a dead layer without any damping
        return torch.where(shifts > 0, shifts, least)[self.first_row]
