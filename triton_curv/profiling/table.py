"""Stages as rows: time, share, FLOPs, bytes, achieved rates, percent of the roof."""

from collections.abc import Mapping
from dataclasses import dataclass

from triton_curv.costs import NOTHING, Cost
from triton_curv.nvtx import Totals
from triton_curv.profiling.roofs import Roofs
from triton_curv.profiling.stages import StageTime


@dataclass(frozen=True)
class StageRow:
    """One stage over all profiled steps; rates are None where the stage has no known cost.

    `seconds` is device time if the profile has any, else host time; `roof` the share of the least time that the
    measured roofs allow.
    """

    stage: str
    calls: int
    seconds: float
    share: float
    host_seconds: float
    flops: int
    bytes: int
    tflops: float | None
    gbs: float | None
    roof: float | None


def rows_of(times: Mapping[str, StageTime], totals: Mapping[str, Totals], roofs: Roofs | None) -> list[StageRow]:
    """A row for each stage, longest first."""
    on_device = any(t.device > 0 for t in times.values())
    seconds = {name: t.device if on_device else t.host for name, t in times.items()}
    whole = sum(seconds.values()) or 1.0
    rows = []
    for name, time in times.items():
        cost = totals[name].cost if name in totals else NOTHING
        rows.append(_row(name, time, seconds[name], seconds[name] / whole, cost, roofs))
    return sorted(rows, key=lambda row: -row.seconds)


def _row(name: str, time: StageTime, seconds: float, share: float, cost: Cost, roofs: Roofs | None) -> StageRow:
    known = cost != NOTHING and seconds > 0
    return StageRow(
        stage=name,
        calls=time.calls,
        seconds=seconds,
        share=share,
        host_seconds=time.host,
        flops=cost.flops,
        bytes=cost.bytes,
        tflops=cost.flops / seconds / 1e12 if known else None,
        gbs=cost.bytes / seconds / 1e9 if known else None,
        roof=roofs.least_time(cost.flops, cost.bytes, "fp32") / seconds if known and roofs is not None else None,
    )
