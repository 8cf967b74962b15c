"""How K-FAC's work on a model is shared out over ranks, what they send, and what time a stated machine would take."""

from torch import nn

from triton_curv.blocks import LayerOptions
from triton_curv.explanation.layers import Explanation
from triton_curv.optimizers.groups import rules_of
from triton_curv.sharding.layers import layer_sizes
from triton_curv.sharding.plan import PlanOptions
from triton_curv.sharding.report import ShardReport, machine_named, shard_report
from triton_curv.sharding.timeline import Workload
from triton_curv.sharding.traffic import Parallel, Wire


def ranks_report(
    model: nn.Module,
    explanation: Explanation,
    world_size: int,
    machine: str = "a100",
    grad_worker_fraction: float = 0.0,
    parallel: Parallel = "plain",
    max_factor_dim: int = 8192,
) -> ShardReport:
    """The plan for `world_size` ranks, each with the explanation's batch.

    Raises:
        ConfigurationError: a machine that is not known, or a number out of range.

    """
    rules, _ = rules_of(model, LayerOptions(max_factor_dim=max_factor_dim))
    trained = [row for row in explanation.rows if row.exact != "frozen"]
    wire = Wire(
        parallel,
        loose=sum(row.numbers for row in trained if row.trainer != "kfac"),
        factor_interval=explanation.factor_interval,
        inverse_interval=explanation.inverse_interval,
    )
    options = PlanOptions(
        world_size,
        grad_worker_fraction=grad_worker_fraction,
        inverse_interval=explanation.inverse_interval,
        machine=machine_named(machine),
    )
    numbers = sum(row.numbers for row in trained)
    workload = Workload(explanation.model_flops, explanation.total("statistics"), numbers)
    return shard_report(layer_sizes(rules), options, wire, workload)
