"""Schedules: when statistics are refreshed, and how learning rate and momentum fall together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from triton_curv.errors import ConfigurationError


class RefreshSchedule(Protocol):
    """How many steps a statistic serves; pure functions of integers, the state is the optimizer's."""

    def interval(self, step: int) -> int:
        """Steps from a refresh at `step` to the next one."""


@dataclass(frozen=True)
class FixedInterval:
    """Refresh at steps 0, n, 2n, ..."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigurationError(f"expected intervals of at least 1 step, got {self.steps}")

    def interval(self, step: int) -> int:
        """To the next multiple of n."""
        return self.steps - step % self.steps


@dataclass(frozen=True)
class GrowingInterval:
    """Refresh at steps 0, 1, 2, 4, 8, ... and, once that is more often, every `most` steps.

    Curvature moves fastest at the start of training (arXiv 1811.12019 section 5), where one batch tells little of it.
    """

    most: int = 32

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ConfigurationError(f"expected intervals of at least 1 step, got {self.most}")

    def interval(self, step: int) -> int:
        """As many steps as have been made, at least 1 and at most `most`."""
        return min(max(step, 1), self.most)


GROWING = GrowingInterval()


def osawa_growing(epoch: int) -> int:
    """min(20, 5 floor(epoch / 5) + 1): from memory, the paper's formula was not retrievable."""
    return min(20, 5 * (epoch // 5) + 1)


def osawa_two_phases(epoch: int) -> int:
    """1 for the first 13 epochs, 20 from then on: from memory, the paper's formula was not retrievable."""
    return 1 if epoch < 13 else 20


@dataclass(frozen=True)
class EpochInterval:
    """An interval that depends on the epoch: `rule(epoch)` steps. Source: arXiv 1811.12019 section 5 (stale Fisher)."""

    steps_per_epoch: int
    rule: Callable[[int], int] = osawa_growing

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise ConfigurationError(f"expected at least 1 step in an epoch, got {self.steps_per_epoch}")

    def interval(self, step: int) -> int:
        """What the rule says for the epoch that `step` lies in."""
        steps = int(self.rule(step // self.steps_per_epoch))
        if steps < 1:
            raise ConfigurationError(f"expected the rule to give at least 1 step, got {steps} at step {step}")
        return steps


@dataclass(frozen=True)
class AdaptiveInterval:
    """SP-NGD's rule, for each statistic on its own: refresh sooner after a change, later while it stays similar.

        X not similar to the last X: max(1, floor(d1 / 2)); to the one before: d1; else d1 + d2, at most `most`

    where d1, d2 are its last two intervals and X is similar to Y iff ||X - Y||_F < alpha ||Y||_F. The comparison is
    read on the host: one sync for each step with a refresh. Source: arXiv 2002.06015, algorithms 1 and 2.
    """

    alpha: float = 0.1
    most: int = 1 << 20

    def __post_init__(self) -> None:
        if not self.alpha > 0 or self.most < 1:
            raise ConfigurationError(f"expected alpha > 0 and most >= 1, got alpha={self.alpha}, most={self.most}")

    def next(self, last: int, before: int, similar_to_last: bool, similar_to_before: bool) -> int:
        """The next interval from the last two."""
        if not similar_to_last:
            steps = max(1, last // 2)
        elif not similar_to_before:
            steps = last
        else:
            steps = last + before
        return min(steps, self.most)


MomentumForm = Literal["paper", "code"]


class PolynomialDecay(LRScheduler):
    r"""eta(e) = eta0 (1 - (e - start)/(end - start))^power for e >= start epochs, eta0 before; momentum falls with it.

    Call `step()` after each optimizer step; e = steps / steps_per_epoch. `eta0` is the learning rate that each
    parameter group has when the schedule is built, m0 its momentum. The update of `KFAC(update_size="none")` is
    v <- m v + P, w <- w - eta v. In it the two forms that exist of v_{t+1} = m(e) v_t - eta P, v in weights, are

    - "paper", m(e) = m0 eta(e) / eta0 (arXiv 2002.06015 eq. 22): m0 eta_{t-1} / eta0 on our v;
    - "code", m0 eta_t / eta_{t-1} (chainerkfac): m0 on our v, a constant.

    Raises:
        ConfigurationError: unless 0 <= start < end, power > 0 and steps_per_epoch >= 1.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        power: float,
        start: float,
        end: float,
        steps_per_epoch: int,
        momentum: MomentumForm = "paper",
    ) -> None:
        if not (0 <= start < end and power > 0 and steps_per_epoch >= 1) or momentum not in ("paper", "code"):
            raise ConfigurationError(
                "expected 0 <= start < end, power > 0, steps_per_epoch >= 1 and momentum 'paper' or 'code', got "
                f"{start=}, {end=}, {power=}, {steps_per_epoch=}, {momentum=}"
            )
        self.power, self.start, self.end, self.steps_per_epoch = power, start, end, steps_per_epoch
        self.momentum: MomentumForm = momentum
        self.base_momenta = [float(group.get("momentum", 0.0)) for group in optimizer.param_groups]
        super().__init__(optimizer)

    def decay(self, step: int) -> float:
        """eta / eta0 at a step."""
        epoch = step / self.steps_per_epoch
        past = (epoch - self.start) / (self.end - self.start)
        return float((1.0 - min(max(past, 0.0), 1.0)) ** self.power)

    def get_lr(self) -> list[Any]:
        """Learning rate of each group at the schedule's step."""
        return [lr * self.decay(self.last_epoch) for lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Set learning rate and momentum of the next optimizer step."""
        super().step(epoch)
        if self.momentum == "paper":
            fallen = self.decay(max(self.last_epoch - 1, 0))
            for group, m0 in zip(self.optimizer.param_groups, self.base_momenta, strict=False):
                if "momentum" in group:
                    value = m0 * fallen
                    old = group["momentum"]
                    group["momentum"] = old.fill_(value) if hasattr(old, "fill_") else value
