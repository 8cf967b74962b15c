"""What an explained model costs on several ranks."""

from dataclasses import dataclass

from triton_curv.explanation.layers import Explanation
from triton_curv.sharding.plan import PlanOptions
from triton_curv.sharding.report import ShardReport, machine_named, shard_report
from triton_curv.sharding.timeline import Workload
from triton_curv.sharding.traffic import Wire


@dataclass(frozen=True)
class Ranks:
    """How many ranks train the model, and how: see `PlanOptions` and `Wire`; `machine` is a name."""

    world_size: int
    shard_size: int | None = None
    grad_worker_fraction: float = 0.0
    parallel: str = "plain"
    wire_bytes: int = 4
    machine: str = "a100"


def on_ranks(explanation: Explanation, ranks: Ranks) -> ShardReport:
    """Balance, bytes against SGD's, memory and predicted time; each rank takes the explained batch.

    Raises ConfigurationError for ranks that do not fit together.
    """
    options = PlanOptions(
        ranks.world_size,
        ranks.shard_size,
        ranks.grad_worker_fraction,
        explanation.inverse_interval,
        machine=machine_named(ranks.machine),
    )
    trained = [row for row in explanation.rows if row.exact != "frozen"]
    wire = Wire(
        ranks.parallel,
        ranks.wire_bytes,
        ranks.wire_bytes,
        sum(row.numbers for row in trained if row.trainer != "kfac"),
        explanation.factor_interval,
        explanation.inverse_interval,
    )
    numbers = sum(row.numbers for row in trained)
    workload = Workload(explanation.model_flops, explanation.total("statistics"), numbers)
    return shard_report(explanation.blocks, options, wire, workload)
