"""Parameters sharded by FSDP2: gradients travel to the ranks that precondition them, updates back to the shards."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from triton_curv.blocks import Block
from triton_curv.optimizers.matrices import Lists, MatrixGroup, Part, Row, fan_out, fan_scales, row_index
from triton_curv.sharding.buckets import even_splits
from triton_curv.sharding.exchange import Channel
from triton_curv.sharding.local import local
from triton_curv.sharding.plan import Plan


class Cut(NamedTuple):
    """A parameter is cut along dimension `dim` into `lengths`, one for each rank; `rest` numbers in each slice."""

    dim: int
    lengths: tuple[int, ...]
    rest: int

    @classmethod
    def of(cls, param: Tensor, ranks: int) -> "Cut":
        """As fully_shard cuts it."""
        assert isinstance(param, DTensor)
        placement = param.placements[-1]
        assert isinstance(placement, Shard)
        dim = placement.dim % param.dim()
        return cls(dim, even_splits(param.shape[dim], ranks), param.numel() // max(param.shape[dim], 1))

    def numel(self, rank: int) -> int:
        """Numbers of a rank's shard."""
        return self.lengths[rank] * self.rest

    def piece(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's shard of the whole parameter, or of what has its shape."""
        return whole.narrow(self.dim, sum(self.lengths[:rank]), self.lengths[rank])


class ShardGroup(MatrixGroup):
    """`MatrixGroup` of sharded parameters: whole matrices of the blocks in `mine` only, momenta and updates of shards.

    Blocks of other ranks have no matrices here; their parts of `Row` are empty.
    """

    def __init__(self, blocks: Sequence[Block], mine: frozenset[int], dtype: torch.dtype, device: torch.device) -> None:
        own = [block for block in blocks if block.index in mine]
        sizes = [block.matrix_size for block in own]
        whole = [torch.zeros(sum(sizes), dtype=dtype, device=device) for _ in range(2)]
        pieces = dict(
            zip((b.index for b in own), zip(*(torch.split(w, sizes) for w in whole), strict=True), strict=True)
        )
        params = [p for block in blocks for p in block.rule.params.values()]
        lengths = [local(p).numel() for p in params]
        self.grads, self.whole_updates = whole
        self.updates, self.momenta = (torch.zeros(sum(lengths), dtype=dtype, device=device) for _ in range(2))
        shards = zip(params, self.updates.split(lengths), self.momenta.split(lengths), strict=True)
        empty = torch.empty(0, dtype=dtype, device=device)
        self.rows = []
        self.whole: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        for block in blocks:
            matrices = [piece.view(block.rule.matrix_shape) for piece in pieces.get(block.index, ())]
            if matrices:
                self.whole[block.index] = (block.rule.views(matrices[0]), block.rule.views(matrices[1]))
            parts = []
            for name in block.rule.params:
                param, update, momentum = next(shards)
                shape = local(param).shape
                fan = fan_out(block.rule, name)
                parts.append(Part(param, empty, update.view(shape), momentum.view(shape), fan))
            grad, update = matrices or (empty, empty)
            self.rows.append(Row(block, grad, update, empty, tuple(parts)))
        self.idle = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], dtype=dtype, device=device)
        self._cache, self._forms = {}, 0

    def _lists(self, rows: list[Row]) -> Lists:
        parts = [part for row in rows for part in row.parts]
        own = [row for row in rows if row.block.index in self.whole]
        sizes = torch.tensor([row.block.matrix_size for row in rows], dtype=self.grads.dtype, device=self.grads.device)
        return Lists(
            operators=[row.block.operator for row in own],
            leaves=[part.param for part in parts],
            params=[local(part.param) for part in parts],
            grads=[],
            updates=[part.update for part in parts],
            momenta=[part.momentum for part in parts],
            row_grads=[row.grad for row in own],
            row_updates=[row.update for row in own],
            flat_grads=self.grads,
            flat_updates=self.updates,
            root_sizes=sizes.sqrt(),
            fan_scales=fan_scales(rows, sizes),
            idle=self.idle,
            row_of_param=[i for i, row in enumerate(rows) for _ in row.parts],
            row_index=row_index(rows, sizes.device),
            block_indices=[row.block.index for row in own],
            fans_out=[part.fan_out for part in parts],
        )


class ShardTransport:
    """One all-to-all from shards to workers, one back. `blocks` are those of all groups; the others' are not here."""

    def __init__(self, groups: Sequence[ShardGroup], plan: Plan, place: int, channel: Channel) -> None:
        self.plan = plan
        self.channel = channel
        self.place = place % plan.grid.size
        self.row = plan.grid.place(place)[1]
        self.rows = {row.block.index: (group, row) for group in groups for row in group.rows}
        self.cuts = {
            part.param: Cut.of(part.param, plan.grid.size) for _, row in self.rows.values() for part in row.parts
        }

    def _of(self, rank: int, active: set[int]) -> list[tuple[int, str, Parameter]]:
        """The parameters whose whole gradients a rank of the replica works on, in one order everywhere."""
        return [
            (i, name, param)
            for i in self.plan.layers_of(rank)
            if i in active
            for name, param in self.rows[i][1].block.rule.params.items()
        ]

    def to_workers_(self, active: set[int]) -> None:
        """Whole gradients into the matrices of the workers."""
        ranks = range(self.plan.grid.size)
        mine = self._of(self.place, active)
        send = [local(_grad(p)).reshape(-1) for rank in ranks for _, _, p in self._of(rank, active)]
        sends = [sum(self.cuts[p].numel(self.place) for _, _, p in self._of(rank, active)) for rank in ranks]
        receives = [sum(self.cuts[p].numel(rank) for _, _, p in mine) for rank in ranks]
        buffer = torch.cat(send).to(self._dtype)
        received = self.channel.all_to_all(buffer, sends, receives).wait()
        pieces = iter(received.split([self.cuts[p].numel(rank) for rank in ranks for _, _, p in mine]))
        for rank in ranks:
            for i, name, param in mine:
                target = self.cuts[param].piece(self.rows[i][0].whole[i][0][name], rank)
                target.copy_(next(pieces).view(target.shape))

    def to_shards_(self, active: set[int]) -> None:
        """Updates of the workers to the shards: each rank gets them from the worker in its own row of the grid."""
        grid, ranks = self.plan.grid, range(self.plan.grid.size)
        beside = [rank for rank in ranks if grid.place(rank)[1] == self.row]
        mine = self._of(self.place, active)
        send = [
            self.cuts[param].piece(self.rows[i][0].whole[i][1][name], rank).reshape(-1)
            for rank in beside
            for i, name, param in mine
        ]
        sends = [sum(self.cuts[p].numel(rank) for _, _, p in mine) if rank in beside else 0 for rank in ranks]
        theirs = [self._of(rank, active) if rank in beside else [] for rank in ranks]
        receives = [sum(self.cuts[p].numel(self.place) for _, _, p in each) for each in theirs]
        buffer = torch.cat(send) if send else torch.empty(0, dtype=self._dtype, device=self._device)
        received = self.channel.all_to_all(buffer, sends, receives).wait()
        wanted = [(i, name, param) for each in theirs for i, name, param in each]
        pieces = received.split([self.cuts[param].numel(self.place) for _, _, param in wanted])
        for (i, name, _), piece in zip(wanted, pieces, strict=True):
            row = self.rows[i][1]
            target = row.parts[list(row.block.rule.params).index(name)].update
            target.copy_(piece.view(target.shape))

    @property
    def _some(self) -> Tensor:
        return next(iter(self.rows.values()))[0].updates

    @property
    def _dtype(self) -> torch.dtype:
        return self._some.dtype

    @property
    def _device(self) -> torch.device:
        return self._some.device


def _grad(param: Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad
