"""Patch matrices by convolution with identity weights: an oracle that knows no unfolding code of ours."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

CONVS: dict[int, Callable[..., nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Setting:
    """A convolution's input (samples, channels of a group, *spatial), kernel and other arguments of `torch.nn.Conv`."""

    input: tuple[int, ...]
    kernel: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False

    @property
    def groups(self) -> int:
        """Groups of channels."""
        return int(self.arguments.get("groups", 1))

    @property
    def n(self) -> int:
        """Numbers of a patch."""
        return self.input[1] * prod(self.kernel)

    def integers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Small whole numbers: every sum of products is exact in fp32, so that results are compared bit for bit."""
        samples, per_group, *sizes = self.input
        generator = torch.Generator().manual_seed(sum(self.input))
        x = torch.randint(-3, 4, (samples, self.groups * per_group, *sizes), generator=generator).to(dtype)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.channels_last else x

    def patches(self, input: Tensor, ones: bool = False) -> Tensor:
        """(groups, rows, n or n + 1) in float64: kernel position first, channel last, then the ones."""
        per_group, positions = self.input[1], prod(self.kernel)
        conv = CONVS[len(self.kernel)](
            self.groups * per_group,
            self.groups * self.n,
            self.kernel,
            bias=False,
            dtype=torch.float64,
            **self.arguments,
        )
        pick = torch.eye(self.n, dtype=torch.float64).view(positions, per_group, positions, per_group)
        weight = pick.permute(0, 1, 3, 2).reshape(self.n, per_group, *self.kernel)
        with torch.no_grad():
            conv.weight.copy_(weight.repeat(self.groups, *[1] * (weight.dim() - 1)))
            if not input.shape[0]:  # convolutions refuse no samples together with some padding modes
                return torch.zeros(self.groups, 0, self.n + ones, dtype=torch.float64)
            out = conv(input.double())
        rows = out.unflatten(1, (self.groups, self.n)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
        return torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if ones else rows

    def expected(self, factor: Tensor, input: Tensor, alpha: float, beta: float, ones: bool) -> Tensor:
        """beta factor + alpha P^T P, by definition, in float64."""
        p = self.patches(input, ones)
        old = torch.zeros_like(factor, dtype=torch.float64) if beta == 0 else beta * factor.double()
        return old + alpha * (p.mT @ p)

    def factor(self, ones: bool) -> Tensor:
        """A symmetric factor of whole numbers."""
        n = self.n + ones
        half = torch.randint(-3, 4, (self.groups, n, n), generator=torch.Generator().manual_seed(n)).float()
        return half + half.mT
