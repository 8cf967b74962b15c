"""What sharing K-FAC out over ranks costs: balance, bytes against SGD's all-reduce, memory, predicted time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from triton_curv.errors import ConfigurationError
from triton_curv.sharding.buckets import even_splits
from triton_curv.sharding.costs import A100, H100, V100, Machine
from triton_curv.sharding.layers import LayerSize
from triton_curv.sharding.plan import Plan, PlanOptions, make_plan
from triton_curv.sharding.timeline import Timeline, Workload, timeline, timeline_of_sgd
from triton_curv.sharding.traffic import Transfer, Wire, bytes_at_most, bytes_per_step, of_sgd, transfers

MACHINES: dict[str, Machine] = {"v100": V100, "a100": A100, "h100": H100}
MIB, MILLION = 2**20, 10**6


@dataclass(frozen=True)
class Memory:
    """Bytes of K-FAC's state on one rank: pending sums of all layers, averages it owns, inverses it works with.

    `moments` are gradients and updates as matrices, and momentum: of all blocks; under FSDP2 matrices of the layers
    that this rank preconditions, updates and momentum of its shards.
    """

    sums: int
    averages: int
    inverses: int
    moments: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.sums + self.averages + self.inverses + self.moments


@dataclass(frozen=True)
class ShardReport:
    """How the work of K-FAC is shared out, and what SGD would send and take; `print` it."""

    plan: Plan
    wire: Wire
    sent: tuple[Transfer, ...]
    sgd_sent: tuple[Transfer, ...]
    memory: tuple[Memory, ...]
    times: Timeline | None
    sgd_times: Timeline | None

    @property
    def bytes_per_step(self) -> float:
        """Bytes that the rank which sends most sends in a mean step."""
        return max(bytes_per_step(self.sent, self.plan.grid.size), default=0.0)

    @property
    def bytes_at_most(self) -> int:
        """Bytes that the rank which sends most sends when everything is due."""
        return max(bytes_at_most(self.sent, self.plan.grid.size), default=0)

    @property
    def sgd_bytes(self) -> int:
        """Bytes that a rank sends in a step of SGD."""
        return max(bytes_at_most(self.sgd_sent, self.plan.grid.size), default=0)

    def to_json(self) -> dict[str, Any]:
        """Numbers as JSON takes them; per-rank lists are those of one replica."""
        plan, grid = self.plan, self.plan.grid
        return {
            "world_size": grid.world_size,
            "grid": asdict(grid),
            "machine": asdict(plan.options.machine),
            "wire": asdict(self.wire),
            "digest": plan.digest,
            "balance": plan.balance,
            "critical_path_ns": plan.critical_path,
            "lower_bound_ns": plan.lower_bound,
            "loads_ns": [asdict(load) for load in plan.loads],
            "owners": {
                layer.name: {f.name: plan.owner(i, number) for number, f in enumerate(layer.factors)}
                for i, layer in enumerate(plan.layers)
            },
            "sent": [asdict(transfer) for transfer in self.sent],
            "bytes_per_step": bytes_per_step(self.sent, grid.size),
            "bytes_at_most": bytes_at_most(self.sent, grid.size),
            "sgd_bytes": self.sgd_bytes,
            "memory": [asdict(memory) for memory in self.memory],
            "times": None if self.times is None else asdict(self.times),
            "sgd_times": None if self.sgd_times is None else asdict(self.sgd_times),
        }

    def __str__(self) -> str:
        return "\n".join([*self._shared_out(), "", *self._bytes(), "", *self._held(), *self._predicted()])

    def _shared_out(self) -> list[str]:
        plan, grid = self.plan, self.plan.grid
        busiest = max(plan.loads, key=lambda load: load.inverse + plan.options.inverse_interval * load.apply)
        idle = sum(not plan.factors_of(position) for position in range(grid.size))
        replicas = f"{grid.replicas} replicas of " if grid.replicas > 1 else ""
        workers = "1 rank preconditions" if grid.rows == 1 else f"{grid.rows} ranks precondition"
        return [
            f"{grid.world_size} ranks: {replicas}{grid.size}, {workers} each layer",
            f"balance {plan.balance:.3f} (busiest rank over its lower bound); the busiest inverts for "
            f"{busiest.inverse / MILLION:.2f} ms and preconditions for {busiest.apply / MILLION:.2f} ms"
            + (f"; {idle} of {grid.size} ranks own no factor" if idle else ""),
        ]

    def _bytes(self) -> list[str]:
        size, lines = self.plan.grid.size, []
        head = ("sent by a rank", "how", "ranks", "every", "most MiB", "mean MiB")
        rows = [
            (t.stage, t.collective, str(t.ranks), str(t.interval), f"{t.most / MIB:.3f}", f"{_mean(t.sent) / MIB:.3f}")
            for t in self.sent
        ]
        lines += table([head, *rows], left=2)
        if not self.sent:
            return ["one rank sends nothing"]
        step = bytes_per_step(self.sent, size)
        ratio = max(step) / max(self.sgd_bytes, 1)
        lines.append(
            f"when everything is due {self.bytes_at_most / MIB:.2f} MiB, in a mean step {max(step) / MIB:.2f} MiB "
            f"(mean over ranks {_mean(step) / MIB:.2f}): {ratio:.2f} x SGD's {self.sgd_bytes / MIB:.2f} MiB"
        )
        if self.wire.parallel == "fsdp":
            lines.append("FSDP2's gathering of parameters, the same for both, is not counted")
        return lines

    def _held(self) -> list[str]:
        most = max(self.memory, key=lambda memory: memory.total)
        parts = ", ".join(f"{name} {count / MIB:.1f}" for name, count in asdict(most).items())
        return [f"memory of the fullest rank {most.total / MIB:.1f} MiB ({parts})"]

    def _predicted(self) -> list[str]:
        if self.times is None or self.sgd_times is None:
            return []
        sgd = {stage.name: stage.ns for stage in self.sgd_times.stages}
        head = ("predicted", "every", "ms", "SGD ms")
        rows = [
            (s.name, str(s.interval), f"{s.ns / MILLION:.3f}", f"{sgd[s.name] / MILLION:.3f}" if s.name in sgd else "")
            for s in self.times.stages
        ]
        machine = self.plan.options.machine
        return [
            "",
            *table([head, *rows], left=1),
            f"step with everything due {self.times.longest / MILLION:.2f} ms, mean step "
            f"{self.times.mean / MILLION:.2f} ms, SGD {self.sgd_times.mean / MILLION:.2f} ms",
            f"assumed, not measured: {machine.name}; {machine.product_flops / 1e12:g} TFLOP/s products, "
            f"{machine.inverse_flops / 1e12:g} TFLOP/s inverses, {machine.memory_bytes / 1e9:g} GB/s memory, "
            f"{machine.node_bytes / 1e9:g} GB/s in a node, {machine.network_bytes / 1e9:g} GB/s between nodes, "
            f"{machine.node_latency_ns / 1e3:g} and {machine.network_latency_ns / 1e3:g} us a hop",
        ]


def shard_report(
    layers: Sequence[LayerSize], options: PlanOptions, wire: Wire, workload: Workload | None = None
) -> ShardReport:
    """Plan, bytes, memory and predicted time of K-FAC for `layers` on `options.world_size` ranks.

    `wire.loose` counts the parameters' numbers that have no block. Without a workload no time is predicted.
    """
    plan = make_plan(layers, options)
    numbers = plan.bucket_gradients.length + wire.loose
    sent = transfers(plan, wire)
    sgd_sent = tuple(t for t in of_sgd(numbers, options.world_size, plan.grid.size, wire) if t.ranks > 1)
    machine = options.machine
    return ShardReport(
        plan,
        wire,
        sent,
        sgd_sent,
        memory_of(plan, wire),
        timeline(plan, sent, wire, workload, machine) if workload else None,
        timeline_of_sgd(sgd_sent, workload, machine) if workload else None,
    )


def memory_of(plan: Plan, wire: Wire, itemsize: int = 4) -> tuple[Memory, ...]:
    """What each rank of a replica holds."""
    sums = sum(f.dense for layer in plan.layers for f in layer.factors)
    gradients = plan.bucket_gradients
    shards = even_splits(gradients.length, plan.grid.size)
    found = []
    for position in range(plan.grid.size):
        layers = [plan.layers[i] for i in plan.layers_of(position)]
        owned = sum(plan.layers[i].factors[f].packed for i, f in plan.factors_of(position))
        moments = 3 * gradients.length
        if wire.parallel == "fsdp":
            moments = 2 * (gradients.splits[position % plan.grid.columns] + shards[position])
        inverses = sum(f.dense for layer in layers for f in layer.factors)
        found.append(Memory(sums * itemsize, owned * itemsize, inverses * itemsize, moments * itemsize))
    return tuple(found)


def machine_named(name: str) -> Machine:
    """One of `MACHINES`. Raises ConfigurationError for another name."""
    if name not in MACHINES:
        raise ConfigurationError(f"expected a machine of {list(MACHINES)}, got {name!r}")
    return MACHINES[name]


def table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines with columns as wide as needed, the first `left` of them aligned left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
