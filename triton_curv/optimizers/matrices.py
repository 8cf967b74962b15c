"""Gradients of blocks as matrices: one flat buffer for a parameter group, with views for blocks and parameters."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from triton_curv.blocks import Block, ConvRule, DenseRule, Rule
from triton_curv.blocks.operator import Operator, solves_in_place
from triton_curv.errors import NoStatisticsError
from triton_curv.optimizers.graph_apply import GraphRow, GraphWork
from triton_curv.optimizers.step_size import Sizes

REFERENCE_FAN_IN = 64


class Part(NamedTuple):
    """One parameter of a block, and the views of the flat buffers that belong to it, in the parameter's shape.

    `fan_out` is d_out for the weight of a linear or convolutional layer, 0 for all else.
    """

    param: Parameter
    grad: Tensor
    update: Tensor
    momentum: Tensor
    fan_out: int


class Row(NamedTuple):
    """One block: its matrices (batch, rows, columns), two of them in the flat buffers, and its parameters."""

    block: Block
    grad: Tensor
    update: Tensor
    momentum: Tensor
    parts: tuple[Part, ...]


class Lists(NamedTuple):
    """The blocks of a group that take part in a step, as the lists that multi-tensor operations take."""

    operators: list[Operator]
    leaves: list[Parameter]  # whose `.grad` is taken; `params` are what is stepped: of DTensors this rank's part
    params: list[Tensor]
    grads: list[Tensor]
    updates: list[Tensor]
    momenta: list[Tensor]
    row_grads: list[Tensor]
    row_updates: list[Tensor]
    flat_grads: Tensor
    flat_updates: Tensor
    root_sizes: Tensor
    fan_scales: Tensor
    idle: Tensor  # hyper-parameters of a step that changes nothing: see `momentum_update_`
    row_of_param: list[int]
    row_index: Tensor  # the same, on the device
    block_indices: list[int]
    fans_out: list[int]
    row_momenta: Sequence[Tensor] = ()  # where a block's lies in one piece
    host_sizes: Sequence[tuple[float, float]] = ()  # root_sizes and fan_scales as numbers, where blocks are whole
    stale: Sequence[Tensor] = ()  # whole buffers, in which other blocks have left what must not enter sums


def fan_out(rule: Rule, name: str) -> int:
    """d_out of a weight that weights rescaling is meant for, 0 for other parameters."""
    groups, rows, _ = rule.matrix_shape
    return groups * rows if isinstance(rule, DenseRule | ConvRule) and name == "weight" else 0


def fan_scale(rule: Rule) -> float:
    """sqrt(64 / columns) of a layer whose inputs have a dense factor A, else 1.

    Steps of that root mean square change the outputs of narrow and wide layers alike, and that of a layer with 64
    inputs as those of root mean square 1 do.
    """
    dense = any(name[0] == "A" and shape.size > 1 for name, shape in rule.factor_shapes.items())
    return (REFERENCE_FAN_IN / rule.matrix_shape[2]) ** 0.5 if dense else 1.0


def fan_scales(rows: Sequence[Row], like: Tensor) -> Tensor:
    """`fan_scale` of each block."""
    return torch.tensor([fan_scale(row.block.rule) for row in rows], dtype=like.dtype, device=like.device)


def root_sizes(rows: Sequence[Row], like: Tensor) -> Tensor:
    """sqrt(numbers) of each block."""
    return torch.tensor([row.block.matrix_size**0.5 for row in rows], dtype=like.dtype, device=like.device)


def with_gradient_in_update(row: Row) -> Row:
    """A block whose gradient is put where its update will be."""
    parts = tuple(part._replace(grad=part.update) for part in row.parts)
    return row._replace(grad=row.update, parts=parts)


def graph_row(row: Row) -> GraphRow:
    """A block as a graph takes it."""
    params, fans = [part.param for part in row.parts], [part.fan_out for part in row.parts]
    whole = len(params) == 1 and row.parts[0].grad.is_contiguous() and params[0].numel() == row.grad.numel()
    return GraphRow(row.block.dense_operator, row.momentum, row.block.rule, params, whole, row.block.index, fans)


def row_index(rows: Sequence[Row], device: torch.device) -> Tensor:
    """The number of its block for each parameter."""
    return torch.tensor([i for i, row in enumerate(rows) for _ in row.parts], dtype=torch.int64, device=device)


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """||x||^2 of each tensor, in one piece: (tensors,). BLAS on a CPU, where `vector_norm` takes ten times as long."""
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(tensors))).square()
    flat = [tensor.view(-1) for tensor in tensors]
    return torch.stack([torch.dot(x, x) for x in flat])


def momentum_squares(lists: Lists) -> Tensor:
    """||m||^2 of what lies here of each block's momentum, (blocks,)."""
    if lists.row_momenta:
        return squared_norms(lists.row_momenta)
    squares = torch.stack(torch._foreach_norm(lists.momenta)).square()
    return torch.zeros_like(lists.root_sizes).index_add_(0, lists.row_index, squares)


class MatrixGroup:
    """Gradient, update and momentum of the blocks of one parameter group."""

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype, device: torch.device) -> None:
        sizes = [block.matrix_size for block in blocks]
        self.grads, self.updates = (torch.zeros(sum(sizes), dtype=dtype, device=device) for _ in range(2))
        self.rows: list[Row] = []
        pieces = zip(*(torch.split(buffer, sizes) for buffer in (self.grads, self.updates)), strict=True)
        for block, flat in zip(blocks, pieces, strict=True):
            matrices = [piece.view(block.rule.matrix_shape) for piece in flat]
            # not flat: a graph that changes views of one buffer has to put it together again
            matrices.append(torch.zeros(block.rule.matrix_shape, dtype=dtype, device=device))
            grads, updates, momenta = (block.rule.views(matrix) for matrix in matrices)
            parts = tuple(
                Part(param, grads[name], updates[name], momenta[name], fan_out(block.rule, name))
                for name, param in block.rule.params.items()
            )
            grad, update, momentum = matrices
            self.rows.append(Row(block, grad, update, momentum, parts))
        self.idle = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], dtype=dtype, device=device)
        self._cache: dict[tuple[bool, ...], Lists] = {}
        self._forms = 0
        self.graph_rows = [graph_row(row) for row in self.rows]
        self.params = [part.param for row in self.rows for part in row.parts]
        self.root_sizes, self.fan_scales = root_sizes(self.rows, self.idle), fan_scales(self.rows, self.idle)

    def active(self, in_place: bool = False) -> Lists:
        """The blocks whose parameters have gradients. Raises NoStatisticsError if only some of a block's have one.

        With `in_place` gradients that are preconditioned in place are put into the buffer of updates at once.
        """
        if self.rows and self.rows[0].block.store.forms != self._forms:  # of the inverses that lists hold
            self._cache.clear()
            self._forms = self.rows[0].block.store.forms
        present = (in_place, *(part.param.grad is not None for row in self.rows for part in row.parts))
        if present not in self._cache:
            rows = [self.rows[i] for i in self._active()]
            if in_place:
                rows = [with_gradient_in_update(row) if solves_in_place(row.block.operator) else row for row in rows]
            stale = (self.grads, self.updates) if len(rows) < len(self.rows) else ()
            self._cache[present] = self._lists(rows)._replace(stale=stale)
        return self._cache[present]

    def in_graph(self, hyper: Tensor) -> GraphWork | None:
        """The same, as a graph takes it; None if no block has gradients."""
        grads = [p.grad for p in self.params]
        if all(grad is not None for grad in grads):
            every = cast("list[Tensor]", grads)
            return GraphWork(self.graph_rows, every, Sizes(self.root_sizes, self.fan_scales, hyper), self.idle)
        active = self._active()
        if not active:
            return None
        sizes = Sizes(self.root_sizes[active], self.fan_scales[active], hyper)
        some = [grad for grad in grads if grad is not None]
        return GraphWork([self.graph_rows[i] for i in active], some, sizes, self.idle)

    def settled(self) -> Iterator[Tensor]:
        """The tensors of all `in_graph`, gradients and parameters apart: always the same."""
        yield from (self.root_sizes, self.fan_scales, self.idle)
        for row in self.graph_rows:
            operator = row.operator
            yield from (row.momentum, *operator.left, *operator.right)
            if operator.gains is not None:
                yield operator.gains

    def _active(self) -> list[int]:
        active = [i for i, row in enumerate(self.rows) if any(part.param.grad is not None for part in row.parts)]
        for row in (self.rows[i] for i in active):
            if any(part.param.grad is None for part in row.parts):
                raise NoStatisticsError(
                    f"block '{row.block.name}': expected a gradient for all of {sorted(row.block.rule.params)}, "
                    "got one for some of them only"
                )
        return active

    def _lists(self, rows: list[Row]) -> Lists:
        parts = [part for row in rows for part in row.parts]
        return Lists(
            operators=[row.block.operator for row in rows],
            leaves=[part.param for part in parts],
            params=[part.param for part in parts],
            grads=[part.grad for part in parts],
            updates=[part.update for part in parts],
            momenta=[part.momentum for part in parts],
            row_grads=[row.grad for row in rows],
            row_updates=[row.update for row in rows],
            flat_grads=self.grads,
            flat_updates=self.updates,
            root_sizes=root_sizes(rows, self.idle),
            fan_scales=fan_scales(rows, self.idle),
            idle=self.idle,
            row_of_param=[i for i, row in enumerate(rows) for _ in row.parts],
            row_index=row_index(rows, self.idle.device),
            block_indices=[row.block.index for row in rows],
            fans_out=[part.fan_out for part in parts],
            row_momenta=[row.momentum for row in rows],
            host_sizes=[(row.block.matrix_size**0.5, fan_scale(row.block.rule)) for row in rows],
        )
