"""Damping: how lambda is shared between the factors of a block, and how it moves while training goes on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from triton_curv.errors import ConfigurationError


def kronecker_shifts(mean_A: Tensor, mean_G: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Multiples of I added to A and G: pi sqrt(lambda) and sqrt(lambda)/pi, pi^2 = mean_A / mean_G.

    `mean_A` and `mean_G` are the mean eigenvalues tr A/dim A and tr G/dim G (any shape), `damping` is lambda
    (broadcastable). The product of the two shifts is lambda. A factor that is exactly zero (dead layer) leaves both
    shifts finite. Source: arXiv 1811.12019 section 3; Martens and Grosse 2015 section 6.3.
    """
    tiny = torch.finfo(mean_A.dtype).tiny
    pi = torch.sqrt(mean_A.clamp_min(tiny)) / torch.sqrt(mean_G.clamp_min(tiny))
    root = torch.sqrt(damping)
    return pi * root, root / pi


class DampingRule(Protocol):
    """What lambda is multiplied with as training goes on; without state of its own, so that optimizers can save it.

    KFAC multiplies the damping of every parameter group (a BN multiplier is a group's larger `damping`), SGN its rho.
    """

    @property
    def interval(self) -> int:
        """Steps between two measurements of a step's reduction ratio; 0 if the rule asks for none."""

    @property
    def reject(self) -> bool:
        """Whether a measured step that raised the loss is taken back."""

    def factor(self, step: int) -> float:
        """The multiplier that the calendar prescribes at a step, counted from 0."""

    def adapt(self, damping: Tensor, ratio: Tensor) -> Tensor:
        """The next damping, from this one and the ratio (actual change of the loss) / (predicted change)."""


@dataclass(frozen=True)
class ConstantDamping:
    """lambda as it stands in the parameter groups."""

    interval: int = 0
    reject: bool = False

    def factor(self, step: int) -> float:
        """Always 1."""
        return 1.0

    def adapt(self, damping: Tensor, ratio: Tensor) -> Tensor:
        """As it was."""
        return damping


@dataclass(frozen=True)
class WarmupDamping:
    """lambda_{t+1} = (1 - alpha) lambda_t + alpha lambda_target, alpha = 2 log10(lambda_0 / lambda_target) / steps.

    lambda_target is the damping of the parameter group, lambda_0 is `ratio` times that. Source: arXiv 1811.12019, in
    the form that LBANN implements (kfac.cpp). Raises ConfigurationError unless ratio >= 1 and alpha <= 1.
    """

    ratio: float
    steps: int
    interval: int = 0
    reject: bool = False

    def __post_init__(self) -> None:
        if not (self.ratio >= 1 and self.steps >= 1 and 2 * math.log10(self.ratio) <= self.steps):
            raise ConfigurationError(
                f"expected ratio >= 1 and steps >= 2 log10(ratio), got ratio={self.ratio}, steps={self.steps}"
            )

    def factor(self, step: int) -> float:
        """1 + (ratio - 1)(1 - alpha)^step."""
        alpha = 2 * math.log10(self.ratio) / self.steps
        return 1.0 + (self.ratio - 1.0) * (1.0 - alpha) ** step

    def adapt(self, damping: Tensor, ratio: Tensor) -> Tensor:
        """As it was."""
        return damping


@dataclass(frozen=True)
class ScheduledDamping:
    """lambda times `schedule(step)`, any function of the step that returns a positive number.

    Module-level functions can be pickled with the optimizer, lambdas can't.
    """

    schedule: Callable[[int], float]
    interval: int = 0
    reject: bool = False

    def factor(self, step: int) -> float:
        """What the function says; raises ConfigurationError if that is no positive number."""
        value = float(self.schedule(step))
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(f"expected the damping schedule to be positive, got {value} at step {step}")
        return value

    def adapt(self, damping: Tensor, ratio: Tensor) -> Tensor:
        """As it was."""
        return damping


@dataclass(frozen=True)
class LevenbergMarquardt:
    """lambda times `grow` where the ratio is below `poor` or no number, max(lambda `shrink`, least) where above `good`.

    The ratio is measured every `interval` steps. `least` and `most` bound the damping that is adapted: for KFAC its
    multiplier, for SGN rho. With `reject`, a measured step after which the loss is higher, or no number, is taken back.
    KFAC's inverses have the new lambda from their next renewal on: with `reject`, renew them every `interval` steps or
    oftener, or the next step may fail like the last.
    Source: Martens and Grosse 2015 section 6.5; arXiv 2006.02409, the authors' code (3/2, 2/3, 1/4, 3/4).
    """

    interval: int = 5
    grow: float = 3 / 2
    shrink: float = 2 / 3
    poor: float = 1 / 4
    good: float = 3 / 4
    least: float = 1e-6
    most: float = 1e6
    reject: bool = False

    def __post_init__(self) -> None:
        fine = self.grow >= 1 >= self.shrink > 0 and self.poor < self.good and 0 <= self.least <= self.most
        if not fine or self.interval < 1:
            raise ConfigurationError(
                f"expected grow >= 1 >= shrink > 0, poor < good, 0 <= least <= most and interval >= 1, got {self}"
            )

    def factor(self, step: int) -> float:
        """Always 1: only measurements count."""
        return 1.0

    def adapt(self, damping: Tensor, ratio: Tensor) -> Tensor:
        """On the device, without a look at the ratio."""
        lower = torch.minimum((damping * self.shrink).clamp_min(self.least), damping)
        higher = torch.maximum((damping * self.grow).clamp_max(self.most), damping)
        return torch.where(ratio > self.good, lower, torch.where(ratio >= self.poor, damping, higher))
