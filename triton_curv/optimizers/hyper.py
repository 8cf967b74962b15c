"""Hyper-parameters as rows of numbers on the device, one row a parameter group: the regions of a step read them there.

Values never enter a compiled graph as Python numbers, so that a schedule recompiles nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_curv.optimizers.hyper_slots import SLOTS
from triton_curv.optimizers.kfac_options import KFACOptions


class OfModel(NamedTuple):
    """What all groups have in common at a step: the damping rule's factor, and the scale of the loss."""

    damping_factor: float
    signal_scale: float | Tensor


def values_of(group: Mapping[str, Any], steps: int, options: KFACOptions, of_model: OfModel) -> list[float | Tensor]:
    """The numbers of one parameter group at a step, in the order of `SLOTS`."""
    lr, momentum, (beta1, beta2) = group["lr"], group["momentum"], group.get("betas", (0.0, 0.0))
    ahead = (momentum, 1.0) if options.nesterov else (1.0, 0.0)
    bias = 1 - momentum ** (steps + 1 + options.nesterov) if options.averages else 1.0
    weights = [1.0, 0.0] if group["kind"] == "fallback" else [ahead[0] / bias, ahead[1] / bias]
    of_update = [lr, momentum, group["weight_decay"], *weights]
    of_block = [1 - momentum, 1 - momentum**steps, lr**2, group["damping"], group["relative_damping"]]
    sign = -1.0 if group["maximize"] else 1.0
    return [*of_update, *of_block, *of_model, sign, beta1, beta2, 1 - beta1, 1 - beta2, group.get("eps", 0.0)]


def write_rows_(
    rows: Tensor, values: Sequence[Sequence[float | Tensor]], written: list[list[float]] | None = None
) -> list[list[float]]:
    """Bring `rows` up to date: floats by one copy that nobody waits for, tensors from where they are.

    While a CUDA graph is captured only tensors are read, so that a replay reads them again. Returns the floats; where
    those are as `written`, nothing is copied.
    """
    floats = [[0.0 if isinstance(v, Tensor) else float(v) for v in row] for row in values]
    if floats != written:
        if rows.is_cuda and torch.cuda.is_current_stream_capturing():
            floats = [] if written is None else written
        else:
            rows.copy_(torch.tensor(floats, dtype=rows.dtype, pin_memory=rows.is_cuda), non_blocking=True)
    for row, given in enumerate(values):
        for slot, value in enumerate(given):
            if isinstance(value, Tensor):
                rows[row, slot].copy_(value)
    return floats


class HyperParameters:
    """`rows` (groups, len(SLOTS)) in the device's memory, always the same tensor."""

    def __init__(self, groups: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(groups, len(SLOTS), dtype=dtype, device=device)
        self._written: list[list[float]] | None = None

    def write_(self, rows: Tensor, values: Sequence[Sequence[float | Tensor]]) -> None:
        """`write_rows_` that remembers what was written."""
        self._written = write_rows_(rows, values, self._written)
