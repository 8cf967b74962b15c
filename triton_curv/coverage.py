"""The coverage report: every parameter, how it is trained, and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

from triton_curv.blocks import Block
from triton_curv.packing import packed_size


@dataclass(frozen=True)
class CoverageRow:
    """One parameter: who trains it (`trainer`), with which curvature and how exact (`note`), and what that costs.

    `factors` holds the factor shapes, `factor_bytes` the memory of their sums and averages and `inverse_bytes` that of
    the inverses, `solve_flops` the work of one preconditioning, `bytes_sent` what this rank sends to others in a step
    in which everything is due. Costs stand in the row of a block's first parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    trainer: str
    note: str
    factors: str = ""
    factor_bytes: int = 0
    solve_flops: int = 0
    bytes_sent: int = 0
    inverse_bytes: int = 0


@dataclass(frozen=True)
class Coverage:
    """All parameters of an optimizer, and what its options do other than was asked; `print` it for a table."""

    rows: tuple[CoverageRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def covered(self) -> float:
        """Share of trained scalars that have a curvature block."""
        total = sum(math.prod(row.shape) for row in self.rows)
        return sum(math.prod(row.shape) for row in self.rows if row.trainer == "kfac") / max(total, 1)

    def __str__(self) -> str:
        head = (
            "parameter",
            "shape",
            "trained by",
            "factors",
            "factors KiB",
            "inverses KiB",
            "kFLOP",
            "bytes sent",
            "curvature",
        )
        cells = [
            (
                row.parameter,
                "x".join(map(str, row.shape)) or "scalar",
                row.trainer,
                row.factors,
                f"{row.factor_bytes / 1024:.1f}" if row.factors else "",
                f"{row.inverse_bytes / 1024:.1f}" if row.factors else "",
                f"{row.solve_flops / 1e3:.1f}" if row.factors else "",
                str(row.bytes_sent) if row.factors else "",
                row.note,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, *cells]
        ]
        factors, inverses = (sum(getattr(row, f"{kind}_bytes") for row in self.rows) for kind in ("factor", "inverse"))
        lines.append(
            f"{self.covered:.1%} of the trained numbers have a curvature block; "
            f"factors take {factors / 2**20:.1f} MiB, inverses {inverses / 2**20:.1f} MiB"
        )
        return "\n".join([*lines, *self.notes])


def coverage_of(
    blocks: Mapping[str, Block],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Parameter, str],
    reasons: Mapping[Parameter, str],
    fallback: str,
    bytes_sent: Sequence[int] | None = None,
    notes: Sequence[str] = (),
) -> Coverage:
    """The report for blocks and the parameters that `fallback` trains, in the order of the parameter groups.

    `bytes_sent` by this rank, by number of the block; nothing by default.
    """
    block_of = {p: block for block in blocks.values() for p in block.rule.params.values()}
    rows: list[CoverageRow] = []
    described: set[str] = set()
    for group in groups:
        for p in group["params"]:
            block = block_of.get(p)
            if block is None:
                note = f"none: {reasons[p]}"
                rows.append(CoverageRow(names[p], tuple(p.shape), fallback, note))
                continue
            shapes, ranks = block.rule.factor_shapes, {factor: form.rank for factor, form in block.forms().items()}
            costs: dict[str, Any] = {}
            if block.name not in described:
                described.add(block.name)
                _, height, width = block.rule.matrix_shape
                across = {name: height if name[0] == "A" else width for name in shapes}
                costs = {
                    "factors": ", ".join(f"{k} {s.batch}x{s.size}x{s.size}" for k, s in shapes.items()),
                    "factor_bytes": sum(
                        t.element_size() * (t.numel() + len(t) * packed_size(t.shape[-1])) for t in block.sums.values()
                    ),
                    "inverse_bytes": sum(t.numel() * t.element_size() for t in block.inverses.values()),
                    "bytes_sent": 0 if bytes_sent is None else bytes_sent[block.index],
                    "solve_flops": sum(
                        2 * across[name] * (2 * ranks[name] * s.size if name in ranks else s.batch * s.size**2)
                        for name, s in shapes.items()
                    ),
                }
            low = [f"{name}^-1 of rank {rank}" for name, rank in ranks.items()]
            known = block.shared.device.type != "meta" and bool(block.shared)
            shared = ["fed without a batch, G as of uncorrelated samples"] if known else []
            note = "; ".join([block.rule.approximation, *low, *shared])
            rows.append(CoverageRow(names[p], tuple(p.shape), "kfac", note, **costs))
    return Coverage(tuple(rows), tuple(notes))
