"""Predicted time of an iteration, from a plan, what is sent, and a machine's stated rates."""

from collections.abc import Sequence
from dataclasses import dataclass

from triton_curv.costs import Cost, update_cost
from triton_curv.sharding.costs import Machine, nanoseconds
from triton_curv.sharding.plan import Plan
from triton_curv.sharding.traffic import Transfer, Wire


@dataclass(frozen=True)
class Workload:
    """What one rank computes in one step whatever the number of ranks.

    Args:
        model_flops: of a forward and a backward pass over the rank's batch; the backward pass is two thirds of it.
        statistics: of the Fisher statistics of that batch.
        parameters: numbers that the update moves.

    """

    model_flops: int
    statistics: Cost
    parameters: int


@dataclass(frozen=True)
class Stage:
    """Time in ns of the slowest rank, each time the stage runs: every `interval` steps."""

    name: str
    ns: int
    interval: int = 1


@dataclass(frozen=True)
class Timeline:
    """The stages of an iteration, one after another."""

    stages: tuple[Stage, ...]

    @property
    def longest(self) -> int:
        """ns of a step in which everything is due."""
        return sum(stage.ns for stage in self.stages)

    @property
    def mean(self) -> float:
        """ns of a mean step."""
        return sum(stage.ns / stage.interval for stage in self.stages)


def timeline_of_sgd(found: Sequence[Transfer], workload: Workload, machine: Machine) -> Timeline:
    """Forward, backward, what of the all-reduce sticks out, update."""
    return Timeline((*_passes(workload, machine), *_sent(found, workload, machine), _update(workload, machine)))


def timeline(plan: Plan, found: Sequence[Transfer], wire: Wire, workload: Workload, machine: Machine) -> Timeline:
    """Forward, backward, statistics, exposed communication, inverses, preconditioning, update.

    What is sent while the backward pass runs hides behind it as far as it is no longer: each step's gradients first,
    then the statistics of A. Inverses and preconditioning take as long as their busiest rank.
    """
    late = ("inverses", "updates")
    statistics = _busy(workload.statistics, machine) + machine.launch_ns * len(plan.layers)
    sent = _sent([t for t in found if t.stage not in late], workload, machine)
    back = {t.stage: Stage(f"send {t.stage}", t.nanoseconds(machine), t.interval) for t in found if t.stage in late}
    stages = [
        *_passes(workload, machine),
        Stage("statistics", statistics, wire.factor_interval),
        *sent,
        Stage("inverses", max(load.inverse for load in plan.loads), wire.inverse_interval),
        *([back["inverses"]] if "inverses" in back else []),
        Stage("preconditioning", max(load.apply for load in plan.loads)),
        *([back["updates"]] if "updates" in back else []),
        _update(workload, machine),
    ]
    return Timeline(tuple(stages))


def _passes(workload: Workload, machine: Machine) -> tuple[Stage, Stage]:
    forward = nanoseconds(workload.model_flops, 3 * machine.product_flops)
    return Stage("forward", forward), Stage("backward", 2 * forward)


def _update(workload: Workload, machine: Machine) -> Stage:
    return Stage("update", machine.launch_ns + _busy(update_cost(workload.parameters), machine))


def _sent(found: Sequence[Transfer], workload: Workload, machine: Machine) -> list[Stage]:
    """What is sent before preconditioning; early transfers are shortened by what the backward pass hides of them."""
    cover = _passes(workload, machine)[1].ns
    stages = []
    for transfer in sorted(found, key=lambda t: (not t.early, t.interval)):
        ns = transfer.nanoseconds(machine)
        hidden = min(cover, ns) if transfer.early else 0
        cover -= hidden
        stages.append(Stage(f"send {transfer.stage}", ns - hidden, transfer.interval))
    return stages


def _busy(cost: Cost, machine: Machine) -> int:
    return max(nanoseconds(cost.flops, machine.product_flops), nanoseconds(cost.bytes, machine.memory_bytes))
