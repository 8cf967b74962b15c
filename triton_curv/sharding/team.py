"""The ranks that train one model with K-FAC: what each step asks of them (arXiv 1811.12019 section 4)."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from triton_curv.blocks import Block, FactorStore, Rule
from triton_curv.blocks.bank import FactorKey, Held, Normalisation
from triton_curv.blocks.operator import Sums
from triton_curv.capture import CaptureSwitch
from triton_curv.errors import ConfigurationError
from triton_curv.nvtx import stage
from triton_curv.optimizers.kfac_options import KFACOptions
from triton_curv.optimizers.matrices import Lists, MatrixGroup, momentum_squares
from triton_curv.sharding.exchange import gather_pieces
from triton_curv.sharding.inverses import share_inverses_, share_status_
from triton_curv.sharding.layers import layer_sizes
from triton_curv.sharding.options import Sharding
from triton_curv.sharding.plan import Plan, PlanOptions, make_plan
from triton_curv.sharding.ranks import Found, open_channels, require_equal
from triton_curv.sharding.state import entries_of, whole_state
from triton_curv.sharding.statistics import StatisticsExchange
from triton_curv.sharding.traffic import Wire, bytes_of_layers

MIB = 1 << 20


def plan_for(rules: Mapping[str, Rule], found: Found, sharding: Sharding, options: KFACOptions, itemsize: int) -> Plan:
    """The plan for a model's blocks on the ranks that were found."""
    interval = options.inverse_interval
    return make_plan(
        layer_sizes(rules),
        PlanOptions(
            world_size=len(found.ranks),
            shard_size=found.shard_size,
            grad_worker_fraction=sharding.fraction,
            inverse_interval=interval if isinstance(interval, int) else 20,
            bucket_elements=sharding.bucket_mib * MIB // itemsize if sharding.overlap else None,
        ),
    )


def no_reduction(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """A communication hook for DDP that leaves every gradient as it is: the optimizer averages them."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class Team:
    """`Exchange` of several ranks that hold whole gradients: without a wrapper, or under DDP.

    Statistics go to the owners of the factors by reduce-scatter, inverses to the other workers of the layer, and
    preconditioned gradients to everyone by all-gather. `averages` says who averages gradients: the wrapper (None), or
    this class, by "all_reduce" or, straight to the workers, by "reduce_scatter".
    """

    def __init__(
        self, rules: Mapping[str, Rule], found: Found, sharding: Sharding, options: KFACOptions, dtype: torch.dtype
    ) -> None:
        device = next(iter(next(iter(rules.values())).params.values())).device
        self.options = options
        self.sharding = sharding
        self.ddp = found.ddp
        self.plan = plan_for(rules, found, sharding, options, dtype.itemsize)
        self.channels = open_channels(found, self.plan.grid, sharding, device)
        self.world = len(found.ranks)
        self.averages = self._who_averages(found.ddp)
        self._of_blocks = {id(p) for rule in rules.values() for p in rule.params.values()}
        self.place = place = self.channels.place
        self.mine = frozenset(self.plan.layers_of(place))
        factors = [[FactorKey(i, f.name) for f in layer.factors] for i, layer in enumerate(self.plan.layers)]
        self.held = Held(
            frozenset(factors[layer][factor] for layer, factor in self.plan.factors_of(place)),
            frozenset(key for layer in self.mine for key in factors[layer]),
            {key: self.plan.owner(key.block, number) for keys in factors for number, key in enumerate(keys)},
        )

    def _who_averages(self, ddp: DistributedDataParallel | None) -> str | None:
        chosen = self.sharding.gradients
        needs_all = self.plan.grid.rows > 1 or self.options.damping_rule.interval > 0
        if chosen == "reduce_scatter" and needs_all:
            raise ConfigurationError(
                "expected gradients='all_reduce' or 'auto' where several ranks precondition a layer, or the damping "
                f"rule measures steps, got 'reduce_scatter' with {self.sharding} and {self.options.damping_rule}"
            )
        if ddp is None:
            return chosen if chosen != "auto" else "all_reduce" if needs_all else "reduce_scatter"
        if chosen == "reduce_scatter":
            ddp.register_comm_hook(None, no_reduction)
            return chosen
        return None

    def attach(self, store: FactorStore, switch: CaptureSwitch) -> None:
        """Bind to the factors and the taps of this rank."""
        self.store = store
        ddp = self.ddp
        may_send: Callable[[], bool] | None = None
        if self.sharding.overlap:
            may_send = (lambda: True) if ddp is None else (lambda: bool(ddp.require_backward_grad_sync))
        self.statistics = StatisticsExchange(store, self.plan, self.channels, may_send)
        if may_send is not None:
            switch.watch = self.statistics
        if self.channels.column.size > 1:
            store.across = lambda rows: self.statistics.across(rows, self.channels.column)

    _shared = False  # whether `gradients_` has averaged this step's

    def matrices_of(self, blocks: Sequence[Block], like: Tensor) -> MatrixGroup:
        """Of all blocks."""
        return MatrixGroup(blocks, like.dtype, like.device)

    # ---- gradients

    def gradients_(self, params: Sequence[Parameter]) -> None:
        """A parameter with a gradient on some rank gets one on all, zeros where it has none; see `averages`.

        Under DDP that is so already. The flags are read on the host.
        """
        self._shared = True
        if self.averages is None or self.world == 1:
            return
        device = self.store.samples.device
        present = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device=device)
        anywhere = self.channels.everyone.all_reduce(present, dist.ReduceOp.MAX).wait().tolist()
        for p, is_there in zip(params, anywhere, strict=True):
            if is_there and p.grad is None:
                p.grad = torch.zeros_like(p)
        every = self.averages == "all_reduce"
        shared = [p.grad for p in params if p.grad is not None and (every or id(p) not in self._of_blocks)]
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for grad in shared:
            by_dtype.setdefault(grad.dtype, []).append(grad)
        for grads in by_dtype.values():
            total = self.channels.everyone.all_reduce(torch.cat([g.reshape(-1) for g in grads])).wait()
            if self.options.reduction == "mean":
                total = total / self.world
            parts = total.split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])

    def matrices_(self, lists: Sequence[Lists], grads: Sequence[Sequence[Tensor]]) -> None:
        """Gradients as matrices; with "reduce_scatter" the averages of those that this rank preconditions."""
        self._shared = False  # those of the next step are not averaged yet
        for each, given in zip(lists, grads, strict=True):
            torch._foreach_copy_(each.grads, list(given))
            if self.options.reduction == "sum" and self.averages is None:
                torch._foreach_mul_(each.row_grads, self.world)  # the wrapper took the mean of the ranks' sums
        if self.averages != "reduce_scatter":
            return
        matrices = {i: m for each in lists for i, m in zip(each.block_indices, each.row_grads, strict=True)}
        by_column = self._by_column(matrices)
        buffer = torch.cat([matrices[i].reshape(-1) for layers in by_column for i in layers])
        splits = [sum(matrices[i].numel() for i in layers) for layers in by_column]
        share = self.channels.row.reduce_scatter(buffer, splits).wait()
        share = self.channels.peers.all_reduce(share, exact=False).wait()
        if self.options.reduction == "mean":
            share = share / self.world
        own = [matrices[i] for i in by_column[self.channels.row.rank]]
        for matrix in matrices.values():
            matrix.zero_()
        if own:
            parts = share.split([m.numel() for m in own])
            torch._foreach_copy_(own, [part.view_as(m) for part, m in zip(parts, own, strict=True)])

    def _by_column(self, matrices: Mapping[int, Tensor]) -> list[list[int]]:
        """The layers that take part in this step, by the column that preconditions them."""
        columns = self.plan.grid.columns
        return [[i for i in sorted(matrices) if self.plan.columns[i] == column] for column in range(columns)]

    def applied(self, blocks: Sequence[int]) -> Sequence[bool]:
        """Those of this rank's column."""
        return [index in self.mine for index in blocks]

    def updates_(self, lists: Sequence[Lists]) -> None:
        """All-gather of preconditioned gradients along the row."""
        if self.channels.row.size > 1:
            self._gather_(lists)

    @stage("all-gather", payload=lambda team, lists: sum(m.nbytes for each in lists for m in each.row_updates))
    def _gather_(self, lists: Sequence[Lists]) -> None:
        updates = {i: m for each in lists for i, m in zip(each.block_indices, each.row_updates, strict=True)}
        by_column = self._by_column(updates)
        own = [updates[i] for i in by_column[self.channels.row.rank]]
        sizes = [[updates[i].numel() for i in layers] for layers in by_column]
        received = gather_pieces(self.channels.row, own, sizes, self.store.samples)
        for layers, pieces in zip(by_column, received, strict=True):
            if layers:
                targets = [updates[i] for i in layers]
                torch._foreach_copy_(targets, [p.view_as(t) for p, t in zip(pieces, targets, strict=True)])

    def norms(self, lists: Sequence[Lists], sums: Sequence[Sums | None]) -> list[Tensor]:
        """All ranks have all updates."""
        return [torch.stack(torch._foreach_norm(each.row_updates)) for each in lists]

    def momentum_norms(self, lists: Sequence[Lists]) -> list[Tensor]:
        """All ranks have all momenta."""
        return [momentum_squares(each).sqrt() for each in lists]

    def products(self, lists: Sequence[Lists], sums: Sequence[Sums | None]) -> list[Tensor]:
        """With "reduce_scatter" each rank knows the gradients of its layers only; the others are zero."""
        local = [torch.dot(each.flat_updates, each.flat_grads) for each in lists]
        if self.averages != "reduce_scatter" or not local:
            return local
        return list(self.channels.row.all_reduce(torch.stack(local)).wait().unbind())

    def whole_norms(self, norms: Tensor) -> Tensor:
        """All ranks have all weights."""
        return norms

    def total(self, number: Tensor) -> Tensor:
        """Over the ranks of a replica, of what each knows of its own layers."""
        return self.channels.replica.all_reduce(number).wait()

    def mean(self, number: Tensor) -> Tensor:
        """Over all ranks."""
        return self.channels.everyone.all_reduce(number).wait() / self.world

    def everywhere(self, numbers: Tensor) -> Tensor:
        """One all-reduce."""
        return self.channels.everyone.all_reduce(numbers).wait()

    def agreed(self, fine: Tensor) -> Tensor:
        """All ranks have looked at the same numbers."""
        return fine

    # ---- curvature

    def seen(self, store: FactorStore, how: Normalisation) -> Tensor:
        """Blocks of which any rank has pending statistics. A collective."""
        return self.statistics.totals(how)[0].counts[:, 1] > 0

    def centres(self, gradients: Sequence[Tensor], counts: Tensor) -> tuple[list[Tensor], Tensor]:
        """One all-reduce, of gradients too where nobody has averaged them yet."""
        done = self.averages is None or (self.averages == "all_reduce" and self._shared)
        local = counts.flatten() if done else torch.cat([counts.flatten(), *(g.flatten() for g in gradients)])
        total = self.channels.everyone.all_reduce(local).wait()
        counts, rest = total[: counts.numel()].view_as(counts), total[counts.numel() :]
        summed = self.options.reduction == "sum"
        if done:
            factor = self.world if summed and self.averages is None else 1
            return [g * factor for g in gradients], counts
        parts = (rest if summed else rest / self.world).split([g.numel() for g in gradients])
        return [part.view_as(g) for part, g in zip(parts, gradients, strict=True)], counts

    def fold_(
        self, store: FactorStore, how: Normalisation, due: Tensor | None, turn: Collection[int] | None = None
    ) -> None:
        """Reduce-scatter of packed triangles, then `store.fold_` of this rank's share."""
        self.statistics.fold(how, due, turn)

    def changes(self, store: FactorStore) -> Tensor:
        """Each rank knows those of its own factors, the others are infinite."""
        return self.channels.replica.all_reduce(store.changes(), dist.ReduceOp.MIN).wait()

    def invert_(self, store: FactorStore, keys: Sequence[FactorKey] | None) -> None:
        """Each rank inverts its own; the inverses go to the column, how it went to everyone."""
        failed = store.failed.clone()
        store.invert_(keys)
        if self.channels.column.size > 1:
            self._gather_inverses_(store, store.keys if keys is None else keys)
        share_status_(store, self.channels, failed)

    @stage("all-gather", payload=lambda team, store, keys: sum(store.view("inverses", key).nbytes for key in keys))
    def _gather_inverses_(self, store: FactorStore, keys: Sequence[FactorKey]) -> None:
        share_inverses_(store, self.plan, self.channels, keys)

    # ---- state

    def whole(self, state: Mapping[int, Mapping[str, Any]], factors: Mapping[FactorKey, int]) -> dict[int, Any]:
        """The state with what single ranks know, on all. `factors`: the parameter that holds each. A collective."""
        owned = [(self.held.owners[key], index, key.name) for key, index in factors.items()]
        return whole_state(state, entries_of(state, owned), self.channels.replica, self.store.samples)

    def bytes_sent(self) -> Sequence[int]:
        """By the plan."""
        parallel = "plain" if self.averages is not None else "fsdp" if self.ddp is None else "ddp"
        itemsize = (self.sharding.wire or self.store.samples.dtype).itemsize
        return bytes_of_layers(self.plan, Wire(parallel, itemsize, itemsize), self.channels.place)

    def require_equal(self, names: Sequence[str], params: Sequence[Tensor]) -> None:
        """All ranks have the same model, options and weights, or all raise RankMismatchError."""
        options = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        plain = {name: value for name, value in options.items() if isinstance(value, str | int | float | None)}
        shapes = [tuple(p.shape) for p in params]
        text = repr((self.plan.digest, plain, self.sharding, list(names), shapes))
        digest = hashlib.sha256(text.encode()).hexdigest()
        weights = [p.detach() for p in params] if self.averages is not None and self.ddp is None else []
        require_equal(self.channels.everyone, self.store.samples.device, digest, weights)
