"""Bytes that each rank sends in each stage, and how long a machine's network takes for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from triton_curv.errors import ConfigurationError
from triton_curv.sharding.buckets import Bucket, even_share, even_splits
from triton_curv.sharding.costs import GIGA, Machine
from triton_curv.sharding.plan import Plan

Parallel = Literal["plain", "ddp", "fsdp"]
Collective = Literal["reduce-scatter", "all-gather", "all-reduce", "all-to-all"]


@dataclass(frozen=True)
class Wire:
    """How numbers travel.

    Args:
        parallel: who reduces gradients. "plain": K-FAC, by reduce-scatter to the workers, or by an all-reduce where a
            layer has several of them (DDP with a comm hook that does nothing counts as plain). "ddp": DDP's all-reduce.
            "fsdp": FSDP2's reduce-scatter; gradient shards go on to the workers and slices of the steps come back.
        statistics, gradients: bytes of a number of a factor or inverse, and of a gradient or step, on the wire.
        loose: numbers of parameters without a block; their gradients are all-reduced.
        factor_interval, inverse_interval: steps from one reduction of the statistics, or gathering of the inverses,
            to the next.

    """

    parallel: str = "plain"
    statistics: int = 4
    gradients: int = 4
    loose: int = 0
    factor_interval: int = 1
    inverse_interval: int = 1

    def __post_init__(self) -> None:
        if self.parallel not in get_args(Parallel):
            raise ConfigurationError(f"expected parallel to be 'plain', 'ddp' or 'fsdp', got {self.parallel!r}")
        if min(self.statistics, self.gradients, self.factor_interval, self.inverse_interval) < 1 or self.loose < 0:
            raise ConfigurationError(f"expected sizes and intervals of at least 1, got {self}")


@dataclass(frozen=True)
class Transfer:
    """One stage's collectives: bytes that each rank of a replica sends, each time it runs.

    Rings send a share on from rank to rank: reduce-scatter everything but the own share, all-gather everything but the
    share of the next rank, all-reduce twice (n - 1)/n. `ranks` of the group lie `stride` apart; `calls` collectives
    follow one another, every `interval` steps; `early` ones while the backward pass runs.
    """

    stage: str
    collective: Collective
    ranks: int
    stride: int
    sent: tuple[int, ...]
    interval: int = 1
    calls: int = 1
    early: bool = False

    @property
    def most(self) -> int:
        """Bytes of the rank that sends most."""
        return max(self.sent)

    def nanoseconds(self, machine: Machine) -> int:
        """Hops x latency + bytes / bandwidth.

        Rings take n - 1 hops (an all-reduce 2 (n - 1), or 2 ceil(log2 n) as a tree if that is faster), messages to all
        ranks n - 1. A ring over neighbouring ranks crosses each node's adapters once and has them for itself; as many
        rings as ranks of the node lie between two members share them, and messages to all are shared by the node.
        """
        if self.ranks == 1 or not self.most:
            return 0
        inside = self.ranks * self.stride <= machine.node
        latency = machine.node_latency_ns if inside else machine.network_latency_ns
        sharing = machine.node if self.collective == "all-to-all" else min(self.stride, machine.node)
        bandwidth = machine.node_bytes if inside else min(machine.node_bytes, machine.network_bytes // sharing)
        hops = self.ranks - 1
        if self.collective == "all-reduce":
            hops = 2 * min(self.ranks - 1, (self.ranks - 1).bit_length())
        return self.calls * hops * latency + -(-self.most * GIGA // bandwidth)


def transfers(plan: Plan, wire: Wire) -> tuple[Transfer, ...]:
    """What K-FAC sends, stage by stage, with this plan; not the parameters that FSDP2 gathers for any optimizer."""
    grid, stage = plan.grid, _Stage(plan)
    found = [
        *stage.statistics("statistics A", plan.buckets_A, wire),
        *stage.statistics("statistics G", plan.buckets_G, wire),
        *stage.gradients(wire),
    ]
    inverses = [plan.bucket_inverses(column).splits for column in range(grid.columns)]
    gathered = [gathering(splits, wire.statistics) for splits in inverses]
    by_position = tuple(gathered[i % grid.columns][i // grid.columns] for i in range(grid.size))
    found.append(Transfer("inverses", "all-gather", grid.rows, grid.columns, by_position, wire.inverse_interval))
    found += stage.updates(wire)
    return tuple(transfer for transfer in found if transfer.ranks > 1)


def bytes_of_layers(plan: Plan, wire: Wire, rank: int) -> tuple[int, ...]:
    """What a rank sends on behalf of each layer in a step in which everything is due; together what `transfers` says.

    Up to rounding: FSDP2's even shards are taken of each layer, not of all gradients in one.
    """
    grid = plan.grid
    position = rank % grid.size
    _, row, column = grid.place(position)
    found = []
    for i, layer in enumerate(plan.layers):
        sent = 0
        mine, numbers = plan.columns[i] == column, layer.gradient
        for number, factor in enumerate(layer.factors):
            owned = plan.owner(i, number) == position
            statistics = reducing(factor.packed, grid.replicas, 1) if owned else factor.packed
            to_next = plan.inverters[i][number] == (row + 1) % grid.rows
            inverses = factor.packed if mine and grid.rows > 1 and not to_next else 0
            sent += (statistics + inverses) * wire.statistics
        share = even_share(numbers, grid.size, position, position + 1)
        if wire.parallel == "fsdp":
            start = position - position % grid.columns
            beside = even_share(numbers, grid.size, start, start + grid.columns) - share
            gradients = numbers - share + reducing(share, grid.replicas, 1) + (grid.rows - mine) * share
            updates = beside if mine else 0
        else:
            updates = numbers if grid.columns > 1 and plan.columns[i] != (column + 1) % grid.columns else 0
            if wire.parallel == "ddp" or grid.rows > 1:
                gradients = reducing(numbers, grid.world_size, 1)
            else:
                gradients = reducing(numbers, grid.replicas, 1) if mine else numbers
        found.append(sent + (gradients + updates) * wire.gradients)
    return tuple(found)


def of_sgd(numbers: int, world_size: int, shard_size: int, wire: Wire) -> tuple[Transfer, ...]:
    """What SGD sends for `numbers` parameters: a ring all-reduce, or FSDP2's reduce-scatter."""
    if wire.parallel != "fsdp":
        sent = (reducing(numbers, world_size, wire.gradients),) * shard_size
        return (Transfer("gradients", "all-reduce", world_size, 1, sent, early=True),)
    return _fsdp_gradients(numbers, world_size, shard_size, wire)


def bytes_per_step(found: Sequence[Transfer], size: int) -> tuple[float, ...]:
    """Bytes that each of `size` ranks of a replica sends in a mean step."""
    return tuple(sum(transfer.sent[i] / transfer.interval for transfer in found) for i in range(size))


def bytes_at_most(found: Sequence[Transfer], size: int) -> tuple[int, ...]:
    """Bytes that each of `size` ranks of a replica sends in a step in which everything is due."""
    return tuple(sum(transfer.sent[i] for transfer in found) for i in range(size))


def gathering(splits: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Bytes that each rank sends in an all-gather of uneven shares: all but the next rank's."""
    total = sum(splits)
    return tuple((total - splits[(i + 1) % len(splits)]) * itemsize for i in range(len(splits)))


def scattering(splits: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Bytes that each rank sends in a reduce-scatter of uneven shares: all but its own."""
    total = sum(splits)
    return tuple((total - split) * itemsize for split in splits)


def reducing(numbers: int, ranks: int, itemsize: int) -> int:
    """Bytes that a rank sends in an all-reduce, 2 (n - 1)/n of all."""
    return 2 * (ranks - 1) * numbers * itemsize // ranks


def _fsdp_gradients(numbers: int, world_size: int, shard_size: int, wire: Wire) -> tuple[Transfer, ...]:
    splits, replicas = even_splits(numbers, shard_size), world_size // shard_size
    return (
        Transfer("gradients", "reduce-scatter", shard_size, 1, scattering(splits, wire.gradients), early=True),
        Transfer(
            "gradients of replicas",
            "all-reduce",
            replicas,
            shard_size,
            tuple(reducing(split, replicas, wire.gradients) for split in splits),
            early=True,
        ),
    )


class _Stage:
    """The transfers of one plan, by position in a replica."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.grid = plan.grid
        self.numbers = plan.bucket_gradients.length
        self.shares = plan.bucket_gradients.splits  # of the columns

    def statistics(self, name: str, buckets: Sequence[Bucket], wire: Wire) -> list[Transfer]:
        """Reduce-scatter to the owners, and between replicas an all-reduce of what each owns."""
        grid = self.grid
        splits = [bucket.splits for bucket in buckets]
        total = [sum(own) for own in zip(*splits, strict=True)]
        shared = tuple(reducing(own, grid.replicas, wire.statistics) for own in total)
        every, calls, early = wire.factor_interval, len(splits), name == "statistics A"
        return [
            Transfer(name, "reduce-scatter", grid.size, 1, scattering(total, wire.statistics), every, calls, early),
            Transfer(f"{name} of replicas", "all-reduce", grid.replicas, grid.size, shared, every, calls, early),
        ]

    def gradients(self, wire: Wire) -> list[Transfer]:
        """Gradients to the ranks that precondition them, and those of loose parameters to everyone."""
        grid, itemsize = self.grid, wire.gradients
        if wire.parallel == "fsdp":
            reduced = _fsdp_gradients(self.numbers + wire.loose, grid.world_size, grid.size, wire)
            sent = tuple(self._shards_sent(position) * itemsize for position in range(grid.size))
            return [*reduced, Transfer("gradients to workers", "all-to-all", grid.size, 1, sent)]
        if wire.parallel == "ddp":
            return list(of_sgd(self.numbers + wire.loose, grid.world_size, grid.size, wire))
        if grid.rows > 1:
            every = (reducing(self.numbers + wire.loose, grid.world_size, itemsize),) * grid.size
            return [Transfer("gradients", "all-reduce", grid.world_size, 1, every)]
        scattered = scattering(self.shares, itemsize)
        between = tuple(reducing(share, grid.replicas, itemsize) for share in self.shares)
        loose = (reducing(wire.loose, grid.world_size, itemsize),) * grid.size
        found = [
            Transfer("gradients", "reduce-scatter", grid.columns, 1, scattered),
            Transfer("gradients of replicas", "all-reduce", grid.replicas, grid.size, between),
        ]
        return found + [Transfer("other gradients", "all-reduce", grid.world_size, 1, loose)] * bool(wire.loose)

    def updates(self, wire: Wire) -> list[Transfer]:
        """Preconditioned gradients from a row's workers to the whole row."""
        grid, itemsize = self.grid, wire.gradients
        if wire.parallel == "fsdp":
            sent = tuple(self._slices_sent(position) * itemsize for position in range(grid.size))
            return [Transfer("updates", "all-to-all", grid.columns, 1, sent)]
        by_column = gathering(self.shares, itemsize)
        return [
            Transfer(
                "updates", "all-gather", grid.columns, 1, tuple(by_column[i % grid.columns] for i in range(grid.size))
            )
        ]

    def _shards_sent(self, position: int) -> int:
        """Numbers of its gradient shards that a rank sends: each to all workers of the layer but itself."""
        grid = self.grid
        column = position % grid.columns
        total = 0
        for i, layer in enumerate(self.plan.layers):
            others = grid.rows - (self.plan.columns[i] == column)
            total += others * even_share(layer.gradient, grid.size, position, position + 1)
        return total

    def _slices_sent(self, position: int) -> int:
        """Numbers of steps that a worker sends: to each other rank of its row the slice that belongs to it."""
        grid = self.grid
        start = position - position % grid.columns
        total = 0
        for i in self.plan.layers_of(position):
            numbers = self.plan.layers[i].gradient
            total += even_share(numbers, grid.size, start, start + grid.columns)
            total -= even_share(numbers, grid.size, position, position + 1)
        return total
