"""The ranks that train one model under FSDP2: no rank holds a whole gradient that it does not precondition."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from triton_curv.blocks import Block, Rule
from triton_curv.blocks.operator import Sums
from triton_curv.errors import ConfigurationError
from triton_curv.nvtx import stage
from triton_curv.optimizers.kfac_options import KFACOptions
from triton_curv.optimizers.matrices import Lists, MatrixGroup, momentum_squares
from triton_curv.sharding.options import Sharding
from triton_curv.sharding.ranks import Found
from triton_curv.sharding.shards import ShardGroup, ShardTransport
from triton_curv.sharding.team import Team


class ShardTeam(Team):
    """`Exchange` of ranks whose parameters, gradients and momenta are shards."""

    def __init__(
        self, rules: Mapping[str, Rule], found: Found, sharding: Sharding, options: KFACOptions, dtype: torch.dtype
    ) -> None:
        if options.damping_rule.interval:
            raise ConfigurationError(
                "expected a damping rule that measures no steps under FSDP2, where no rank holds whole weights, got "
                f"{options.damping_rule}"
            )
        if sharding.gradients != "auto":
            raise ConfigurationError(
                f"expected gradients='auto' under FSDP2, which reduces them itself, got {sharding.gradients!r}"
            )
        super().__init__(rules, found, sharding, options, dtype)
        self.averages = None
        self.groups: list[ShardGroup] = []

    def matrices_of(self, blocks: Sequence[Block], like: Tensor) -> MatrixGroup:
        """Whole matrices of this rank's blocks, shards of the others."""
        self.groups.append(ShardGroup(blocks, self.mine, like.dtype, like.device))
        return self.groups[-1]

    @property
    def transport(self) -> ShardTransport:
        """Between shards and workers, once all groups are there."""
        if not hasattr(self, "_transport"):
            channel = self.channels.replica
            exact = replace(channel, wire=None) if channel.wire == torch.float16 else channel
            self._transport = ShardTransport(self.groups, self.plan, self.channels.place, exact)
        return self._transport

    def _active(self, lists: Sequence[Lists]) -> set[int]:
        leaves = {id(p) for each in lists for p in each.leaves}
        rows = [row for group in self.groups for row in group.rows]
        return {row.block.index for row in rows if id(row.parts[0].param) in leaves}

    def matrices_(self, lists: Sequence[Lists], grads: Sequence[Sequence[Tensor]]) -> None:
        """Shards of gradients to the workers."""
        if not lists:
            return
        self.transport.to_workers_(self._active(lists))
        for each in lists:
            if self.options.reduction == "sum" and each.row_grads:
                torch._foreach_mul_(each.row_grads, self.world)

    @stage("all-gather", payload=lambda team, lists: sum(m.nbytes for each in lists for m in each.row_updates))
    def updates_(self, lists: Sequence[Lists]) -> None:
        """Updates to the shards."""
        if lists:
            self.transport.to_shards_(self._active(lists))

    def norms(self, lists: Sequence[Lists], sums: Sequence[Sums | None]) -> list[Tensor]:
        """The workers know them; one all-reduce."""
        if not lists:
            return []
        squares = [torch.zeros_like(each.root_sizes) for each in lists]
        for each, total in zip(lists, squares, strict=True):
            if each.row_updates:
                own = torch.stack(torch._foreach_norm(each.row_updates)).square()
                total[self._places(each)] = own
        return [total.sqrt() for total in self._from_workers(squares)]

    def momentum_norms(self, lists: Sequence[Lists]) -> list[Tensor]:
        """From the shards of momenta, which all ranks of a replica hold."""
        if not lists:
            return []
        squares = self.channels.replica.all_reduce(torch.cat([momentum_squares(each) for each in lists])).wait()
        return list(squares.sqrt().split([len(each.root_sizes) for each in lists]))

    def products(self, lists: Sequence[Lists], sums: Sequence[Sums | None]) -> list[Tensor]:
        """<P, D> of this rank's blocks, summed over the workers."""
        zero = self.store.samples.new_zeros(1)
        local = [
            torch.stack([torch.sum(p * d) for p, d in zip(each.row_updates, each.row_grads, strict=True)]).sum().view(1)
            if each.row_updates
            else zero
            for each in lists
        ]
        return [total[0] for total in self._from_workers(local)]

    def _places(self, lists: Lists) -> list[int]:
        """Where this rank's blocks stand among all active ones of a group."""
        rows = [row for group in self.groups for row in group.rows]
        first = {id(row.parts[0].param): row.block.index for row in rows}
        order = [first[id(p)] for p in lists.leaves if id(p) in first]
        place = {index: i for i, index in enumerate(order)}
        return [place[index] for index in lists.block_indices]

    def _from_workers(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the ranks of a row, which hold every block once."""
        if not vectors:
            return []
        total = self.channels.row.all_reduce(torch.cat(list(vectors))).wait()
        return list(total.split([len(v) for v in vectors]))

    def whole_norms(self, norms: Tensor) -> Tensor:
        """||w|| of weights from those of their shards."""
        return self.channels.replica.all_reduce(norms.square()).wait().sqrt()

    def agreed(self, fine: Tensor) -> Tensor:
        """Every shard must be finite: one all-reduce."""
        return self.channels.replica.all_reduce(fine.to(torch.int32), dist.ReduceOp.MIN).wait() > 0
