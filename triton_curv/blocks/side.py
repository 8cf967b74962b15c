"""One Kronecker factor of a layer: whole, in diagonal blocks where it is too large, or only its diagonal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from triton_curv.blocks.products import add_product_, waiting
from triton_curv.blocks.rule import FactorShape
from triton_curv.costs import NOTHING, Cost, factor_cost
from triton_curv.nvtx import Stage, stage

MAX_BLOCKS = 4  # a factor that needs more blocks than this is made diagonal


@dataclass(frozen=True)
class Side:
    """The second moment of `size` coordinates, one matrix for each of `groups`, as the factors `shapes`.

    More than `limit` coordinates are split into at most `MAX_BLOCKS` blocks whose sizes differ by at most one: those
    larger by one first ("A.0"), then the others ("A.1"). Where that is not enough, only the diagonal is kept: the head
    of a language model, whose G is nearly diagonal (diag(p) - p p^T for softmax outputs p), has 50 000 coordinates.
    """

    name: Literal["A", "G"]
    size: int
    groups: int
    shapes: Mapping[str, FactorShape]

    @classmethod
    def of(cls, name: Literal["A", "G"], size: int, limit: int, groups: int = 1, diagonal: bool = False) -> "Side":
        """The side for `size` coordinates whose factors may have `limit` rows."""
        count = -(-size // limit)
        if diagonal or count > MAX_BLOCKS:
            return cls(name, size, groups, {name: FactorShape(groups * size, 1, blocks=size)})
        least, larger = divmod(size, count)
        pieces = [(n, width) for n, width in ((larger, least + 1), (count - larger, least)) if n]
        names = [name] if len(pieces) == 1 else [f"{name}.{i}" for i in range(len(pieces))]
        shapes = {key: FactorShape(groups * n, width, n) for key, (n, width) in zip(names, pieces, strict=True)}
        return cls(name, size, groups, shapes)

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonal is kept (of one coordinate, the whole)."""
        return self.size > 1 and next(iter(self.shapes.values())).size == 1

    @property
    def note(self) -> str:
        """How the factor differs from a whole one, for `explain()`; empty if it does not."""
        count = sum(shape.blocks for shape in self.shapes.values())
        if self.diagonal:
            return f"{self.name} diagonal ({self.size} coordinates)"
        return f"{self.name} split into {count} diagonal blocks ({self.size} coordinates)" if count > 1 else ""

    def _cost_of(self, rows: Tensor) -> Cost:
        """Of adding the outer products of rows, if that is done at once."""
        if waiting() and not self.diagonal:
            return NOTHING
        shapes = self.shapes.values()
        return sum((factor_cost(rows.shape[-2], s.size, s.batch, rows.element_size()) for s in shapes), NOTHING)

    @stage(lambda side, *_: stage_of(side.name), payload=lambda side, sums, rows, *_: side._cost_of(rows))
    def accumulate_(self, sums: Mapping[str, Tensor], rows: Tensor, ones: bool = False, scale: float = 1.0) -> None:
        """Factor += scale X^T X of rows (k, n) or (groups, k, n); with `ones` a last coordinate is 1 in every row."""
        if self.groups == 1 and all(shape.size == self.size for shape in self.shapes.values()):
            add_product_(sums[self.name][0], rows if rows.dim() == 2 else rows[0], scale, ones=ones)
            return
        rows = rows if rows.dim() == 3 else rows[None]
        if self.diagonal:
            total = sums[self.name].view(self.groups, self.size)
            norms = torch.linalg.vector_norm(rows, dim=-2, dtype=total.dtype)
            total[:, : rows.shape[-1]].add_(norms.square_(), alpha=scale)
            if ones:
                total[:, -1].add_(scale * rows.shape[-2])
            return
        start = 0
        for key, (_, width, count, _) in self.shapes.items():
            factor = sums[key].view(self.groups, count, width, width)
            for block in range(count):
                stop = start + width
                part = rows[..., start:stop]
                if self.groups == 1:
                    add_product_(factor[0, block], part[0], scale, ones=ones and stop == self.size)
                else:
                    add_product_(factor[:, block], part, scale, ones=ones and stop == self.size)
                start = stop

    def present(self, factor: Tensor) -> Tensor:
        """A factor as the user is shown it: (groups,) + (n, n), (blocks, n, n) or (n,) without groups of one."""
        if self.diagonal:
            factor = factor.view(self.groups, self.size)
        elif factor.shape[0] != self.groups:
            factor = factor.unflatten(0, (self.groups, -1))
        return factor[0] if self.groups == 1 else factor


def stage_of(factor: str) -> Stage:
    """The stage in which statistics of a factor, named A or G, are taken."""
    return "factor A" if factor[0] == "A" else "factor G"


def times_left(factors: Sequence[Tensor], matrix: Tensor) -> Tensor:
    """diag(F_1, F_2, ...) @ D for D (batch, rows, columns); factors (batch * count, n, n) make up its rows."""
    batch, _, columns = matrix.shape
    parts, start = [], 0
    for factor in factors:
        count, width = len(factor) // batch, factor.shape[-1]
        part = matrix[:, start : start + count * width]
        if width == 1:
            parts.append(part * factor.view(batch, count, 1))
        elif count == 1:
            parts.append(factor @ part)
        else:
            blocks = factor.view(batch, count, width, width) @ part.view(batch, count, width, columns)
            parts.append(blocks.view(batch, count * width, columns))
        start += count * width
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def times_left_into(factors: Sequence[Tensor], matrix: Tensor, out: Tensor) -> None:
    """out = diag(F_1, F_2, ...) @ D, one pass over memory for a diagonal, none for no factor and D in `out` already."""
    if not factors:
        if out is not matrix:
            out.copy_(matrix)
    elif len(factors) == 1 and factors[0].shape[-1] == 1:
        torch.mul(matrix, factors[0].view(len(matrix), -1, 1), out=out)
    elif len(factors) == 1 and len(factors[0]) == len(matrix) == 1:
        torch.mm(factors[0][0], matrix[0], out=out[0])
    else:
        out.copy_(times_left(factors, matrix))


def times_right(matrix: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """D @ diag(F_1, F_2, ...) for D (batch, rows, columns); factors (batch * count, n, n) make up its columns."""
    batch, rows, _ = matrix.shape
    parts, start = [], 0
    for factor in factors:
        count, width = len(factor) // batch, factor.shape[-1]
        part = matrix[..., start : start + count * width]
        if width == 1:
            parts.append(part * factor.view(batch, 1, count))
        elif count == 1:
            parts.append(part @ factor)
        else:
            blocks = part.unflatten(-1, (count, width)).transpose(1, 2) @ factor.view(batch, count, width, width)
            parts.append(blocks.transpose(1, 2).reshape(batch, rows, count * width))
        start += count * width
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) if parts else matrix
