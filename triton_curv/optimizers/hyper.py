"""Hyper-parameters as rows of numbers on the device, one row a parameter group: the regions of a step read them there.

Values never enter a compiled graph as Python numbers, so that a schedule recompiles nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_curv.hostcheck import on_host
from triton_curv.optimizers.hyper_slots import SLOT, SLOTS
from triton_curv.optimizers.kfac_options import KFACOptions


class OfModel(NamedTuple):
    """What all groups have in common at a step: the damping rule's factor, and the scale of the loss."""

    damping_factor: float
    signal_scale: float | Tensor


def values_of(group: Mapping[str, Any], options: KFACOptions, of_model: OfModel) -> list[float | Tensor]:
    """The numbers of one parameter group, in the order of `SLOTS`, before `corrected`."""
    lr, momentum, (beta1, beta2) = group["lr"], group["momentum"], group.get("betas", (0.0, 0.0))
    has_blocks = group["kind"] != "fallback"
    weights = (momentum, 1.0) if options.nesterov and has_blocks else (1.0, 0.0)
    of_update = [lr, momentum, group["weight_decay"], *weights]
    corrects = float(options.averages and has_blocks)
    of_block = [1 - momentum, 1.0, corrects, lr**2, group["damping"], group["relative_damping"]]
    sign = -1.0 if group["maximize"] else 1.0
    return [*of_update, *of_block, *of_model, sign, beta1, beta2, 1 - beta1, 1 - beta2, group.get("eps", 0.0)]


def corrected(hyper: Tensor, steps: Tensor, nesterov: bool) -> Tensor:
    """A row with the bias of an average that starts at zero taken out, at the step after `steps` (1,) of them.

    On the device, where the steps are counted: in a CUDA graph that is replayed, too, they go on.
    """
    if on_host(hyper):
        return torch.tensor(corrected_numbers(hyper.tolist(), float(steps), nesterov), dtype=hyper.dtype)
    momentum, corrects = hyper[SLOT["momentum"]], hyper[SLOT["corrects"]]
    bias = 1 - corrects * momentum ** (steps + 1 + nesterov)
    weights, settled = slice(SLOT["momentum_weight"], SLOT["update_weight"] + 1), SLOT["settled"]
    before, between = hyper[: weights.start], hyper[weights.stop : settled]
    return torch.cat([before, hyper[weights] / bias, between, 1 - momentum**steps, hyper[settled + 1 :]])


def corrected_numbers(row: list[float], past: float, nesterov: bool) -> list[float]:
    """`corrected` of a row of numbers, changed in place."""
    bias = 1 - row[SLOT["corrects"]] * row[SLOT["momentum"]] ** (past + 1 + nesterov)
    for name in ("momentum_weight", "update_weight"):
        row[SLOT[name]] /= bias
    row[SLOT["settled"]] = 1 - row[SLOT["momentum"]] ** past
    return row


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
    """`rows` (groups, len(SLOTS)) and `steps` (1,) taken, in the device's memory, always the same tensors.

    A step counts itself there; the host writes the number only where it is another than what it left there.
    """

    def __init__(self, groups: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(groups, len(SLOTS), dtype=dtype, device=device)
        self.steps = torch.zeros(1, dtype=dtype, device=device)
        self._written: list[list[float]] | None = None
        self._counted = 0

    def write_(self, rows: Tensor, steps: Tensor, values: Sequence[Sequence[float | Tensor]], count: int) -> None:
        """`write_rows_` that remembers what was written, and the number of steps."""
        self._written = write_rows_(rows, values, self._written)
        if self._counted != count:
            steps.fill_(count)
            self._counted = count

    def count(self) -> None:
        """A step has been taken on the device."""
        self._counted += 1
