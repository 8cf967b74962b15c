"""The explanation of a model as data: a row for each block and each parameter without one, totals, JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from triton_curv.costs import NOTHING, Cost
from triton_curv.sharding.layers import LayerSize

Exactness = Literal["exact", "approximate", "no curvature", "frozen"]


@dataclass(frozen=True)
class LayerRow:
    """One block, or one parameter without a block: coverage, memory and the least work of each stage.

    `exact` says whether the block is the whole empirical Fisher of its parameters; `calls` counts its uses in one
    forward, 0 if the pass did not reach it. Memory in bytes: factors (pending sums, averages), inverses, and moments
    (momentum with the gradient and the update as matrices, or what a first-order rule keeps). Costs: statistics of one
    step that takes them, one renewal of the inverses, one preconditioning, one update.
    """

    layer: str
    kind: str
    parameters: tuple[str, ...]
    numbers: int
    trainer: str
    exact: Exactness
    note: str
    factors: str = ""
    calls: int = 0
    factor_bytes: int = 0
    inverse_bytes: int = 0
    moment_bytes: int = 0
    statistics: Cost = NOTHING
    inverse: Cost = NOTHING
    apply: Cost = NOTHING
    update: Cost = NOTHING

    @property
    def memory(self) -> int:
        """Bytes of optimizer state."""
        return self.factor_bytes + self.inverse_bytes + self.moment_bytes


@dataclass(frozen=True)
class StageCost:
    """A stage of the whole model: cost when it runs, every how many steps it does."""

    stage: str
    cost: Cost
    interval: int

    @property
    def flops_per_step(self) -> float:
        """Spread over the interval."""
        return self.cost.flops / self.interval


@dataclass(frozen=True)
class Explanation:
    """All of a model; `model_flops` are those of one forward and backward pass on `input_shape`.

    `blocks` are the sizes that a plan for several ranks is made from.
    """

    model: str
    input_shape: tuple[int, ...]
    input_dtype: str
    parameter_bytes: int
    model_flops: int
    factor_interval: int
    inverse_interval: int
    rows: tuple[LayerRow, ...]
    blocks: tuple[LayerSize, ...] = ()

    def total(self, name: Literal["statistics", "inverse", "apply", "update"]) -> Cost:
        """Cost of a stage over all layers."""
        return sum((getattr(row, name) for row in self.rows), NOTHING)

    @property
    def stages(self) -> Sequence[StageCost]:
        """The stages of a step."""
        return (
            StageCost("statistics", self.total("statistics"), self.factor_interval),
            StageCost("inverses", self.total("inverse"), self.inverse_interval),
            StageCost("precondition", self.total("apply"), 1),
            StageCost("update", self.total("update"), 1),
        )

    @property
    def flops_per_step(self) -> float:
        """What the optimizer adds to a mean step."""
        return sum(stage.flops_per_step for stage in self.stages)

    @property
    def covered(self) -> float:
        """Share of trained numbers that have a curvature block."""
        trained = [row for row in self.rows if row.exact != "frozen"]
        blocks = sum(row.numbers for row in trained if row.trainer == "kfac")
        return blocks / max(sum(row.numbers for row in trained), 1)

    def memory(self) -> dict[str, int]:
        """Bytes of optimizer state by kind."""
        return {
            "factors": sum(row.factor_bytes for row in self.rows),
            "inverses": sum(row.inverse_bytes for row in self.rows),
            "moments": sum(row.moment_bytes for row in self.rows),
        }

    def to_json(self) -> dict[str, Any]:
        """All fields, and the totals, as JSON takes them."""
        fields = asdict(self)
        del fields["blocks"]
        for row, given in zip(fields["rows"], self.rows, strict=True):
            row.update({name: getattr(given, name)._asdict() for name in ("statistics", "inverse", "apply", "update")})
        stages = [
            {"stage": s.stage, **s.cost._asdict(), "interval": s.interval, "flops_per_step": s.flops_per_step}
            for s in self.stages
        ]
        totals = {"covered": self.covered, "memory": self.memory(), "stages": stages}
        return {**fields, **totals, "flops_per_step": self.flops_per_step}
