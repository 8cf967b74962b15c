"""Hyper-parameters as rows of numbers on the device, one row a parameter group: the regions of a step read them there.

Values never enter a compiled graph as Python numbers, so that a schedule recompiles nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_curv.optimizers.kfac_options import KFACOptions

# The first five are what `momentum_update_` takes; `average` is 1 - momentum, and
# `settled` the sum of the weights that the momentum, an average, holds before the step: 1 - momentum^steps.
SLOTS = (
    "lr",
    "momentum",
    "weight_decay",
    "momentum_weight",
    "update_weight",
    "average",
    "settled",
    "lr_squared",
    "damping",
    "relative_damping",
)
SLOT = {name: i for i, name in enumerate(SLOTS)}
OF_UPDATE = 5


def values_of(group: Mapping[str, Any], steps: int, options: KFACOptions) -> list[float | Tensor]:
    """The numbers of one parameter group at a step, in the order of `SLOTS`."""
    lr, momentum = group["lr"], group["momentum"]
    ahead = (momentum, 1.0) if options.nesterov else (1.0, 0.0)
    bias = 1 - momentum ** (steps + 1 + options.nesterov) if options.averages else 1.0
    of_update = [lr, momentum, group["weight_decay"], ahead[0] / bias, ahead[1] / bias]
    return [*of_update, 1 - momentum, 1 - momentum**steps, lr**2, group["damping"], group["relative_damping"]]


class HyperParameters:
    """`rows` (groups, len(SLOTS)) in the device's memory, always the same tensor, and `of_group`, its views."""

    def __init__(self, groups: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(groups, len(SLOTS), dtype=dtype, device=device)
        self.of_group = self.rows.unbind()
        self._written: list[list[float]] | None = None

    def write_(self, groups: Sequence[Mapping[str, Any]], steps: int, options: KFACOptions) -> None:
        """Bring the rows up to date: floats by one copy that nobody waits for, tensors from where they are.

        While a CUDA graph is captured only tensors are read, so that a replay reads them again.
        """
        values = [values_of(group, steps, options) for group in groups]
        floats = [[0.0 if isinstance(v, Tensor) else float(v) for v in row] for row in values]
        cuda = self.rows.is_cuda
        if floats != self._written and not (cuda and torch.cuda.is_current_stream_capturing()):
            self.rows.copy_(torch.tensor(floats, dtype=self.rows.dtype, pin_memory=cuda), non_blocking=True)
            self._written = floats
        for row, given in zip(self.of_group, values, strict=True):
            for slot, value in enumerate(given):
                if isinstance(value, Tensor):
                    row[slot].copy_(value)
