"""Ready-made settings of published runs: the numbers of their tables, and a mark on each number that is ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from triton_curv.augment import RandomErasing, RunningMixup
from triton_curv.blocks import LayerOptions
from triton_curv.damping import ConstantDamping, DampingRule, WarmupDamping
from triton_curv.errors import ConfigurationError
from triton_curv.optimizers.kfac import KFAC
from triton_curv.schedules import AdaptiveInterval, EpochInterval, MomentumForm, PolynomialDecay, osawa_growing

IMAGENET_SAMPLES = 1_281_167
Stale = Literal["none", "epoch", "adaptive"]


class Row(NamedTuple):
    """One line of the hyper-parameter table of arXiv 2002.06015 (Table 2)."""

    mixup_alpha: float
    power: float
    start: float
    end: float
    lr: float
    momentum: float
    damping: float
    steps: int
    top1: float


OSAWA: Mapping[int, Row] = {
    4_096: Row(0.4, 11.0, 1, 53, 8.18e-3, 0.997, 2.5e-4, 10_948, 74.8),
    8_192: Row(0.4, 8.0, 1, 53.5, 1.25e-2, 0.993, 2.5e-4, 5_434, 75.3),
    16_384: Row(0.4, 8.0, 1, 53.5, 2.5e-2, 0.985, 2.5e-4, 2_737, 75.2),
    32_768: Row(0.6, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 2.0e-4, 1_760, 75.4),
    65_536: Row(0.6, 2.9, 2, 64.5, 4.0e-2, 0.95, 1.5e-4, 1_173, 75.6),
    131_072: Row(1.0, 2.9, 3, 100, 7.0e-2, 0.93, 1.0e-4, 873, 74.9),
}
# (BN damping multiplier, warm-up steps) of Table 3 in arXiv 1811.12019, from memory: the table was not retrievable
WARMUP: Mapping[int, tuple[float, int]] = {
    4_096: (16.0, 313),
    8_192: (16.0, 157),
    16_384: (32.0, 79),
    32_768: (32.0, 59),
    65_536: (16.0, 40),
    131_072: (16.0, 30),
}


@dataclass(frozen=True)
class Osawa2019:
    """ResNet-50 on ImageNet in the scheme of Osawa et al.; `optimizer(model)`, then `schedule(optimizer)`.

    `ours` names each value that no retrieved source gives, and why it is what it is.
    """

    batch_size: int
    table: Row
    steps_per_epoch: int
    stale: Stale
    warmup_damping: bool
    momentum_form: MomentumForm
    ours: Mapping[str, str]

    @property
    def norm_damping(self) -> float:
        """Damping of the normalisation layers: the multiplier is part of warm-up damping (2019), not of SP-NGD."""
        return self.table.damping * (WARMUP[self.batch_size][0] if self.warmup_damping else 1.0)

    @property
    def damping_rule(self) -> DampingRule:
        """Constant, as in SP-NGD, or the warm-up of 2019."""
        return (
            WarmupDamping(ratio=100.0, steps=WARMUP[self.batch_size][1]) if self.warmup_damping else ConstantDamping()
        )

    def optimizer(self, model: nn.Module, **overrides: Any) -> KFAC:
        """`KFAC` with the paper's update, no moving average, unit-wise BN Fisher and weights rescaling.

        `overrides` are arguments of KFAC that take precedence.
        """
        row = self.table
        interval = {
            "none": 1,
            "epoch": EpochInterval(self.steps_per_epoch, osawa_growing),
            "adaptive": AdaptiveInterval(),
        }
        every = interval[self.stale]
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        settings: dict[str, Any] = {
            "lr": row.lr,
            "momentum": row.momentum,
            "damping": row.damping,
            "damping_rule": self.damping_rule,
            "update_size": "none",
            "factor_decay": 0.0,
            "factor_interval": every,
            "inverse_interval": 1 if self.stale == "adaptive" else every,
            "inverse": "cholesky",
            "norm_fisher": "unit",
            "max_output_dim": LayerOptions().max_factor_dim,  # a whole G in the classifier, too
            "rescale": "paper",
            "fallback": "sgd",
            "groups": [{"modules": norms, "damping": self.norm_damping}] if norms and self.warmup_damping else [],
        }
        return KFAC(model, **{**settings, **overrides})

    def schedule(self, optimizer: KFAC) -> PolynomialDecay:
        """Learning rate and momentum; call its `step()` after each optimizer step."""
        row = self.table
        return PolynomialDecay(
            optimizer,
            power=row.power,
            start=row.start,
            end=row.end,
            steps_per_epoch=self.steps_per_epoch,
            momentum=self.momentum_form,
        )

    def mixup(self) -> RunningMixup:
        """Running mixup with the table's alpha."""
        return RunningMixup(self.table.mixup_alpha)

    def erasing(self) -> RandomErasing:
        """Random erasing with zeros, as the paper describes it."""
        return RandomErasing()


def osawa2019(
    batch_size: int,
    *,
    samples: int = IMAGENET_SAMPLES,
    stale: Stale = "adaptive",
    warmup_damping: bool = False,
    momentum_form: MomentumForm = "paper",
) -> Osawa2019:
    """Optimizer, schedules and augmentation of arXiv 1811.12019 and 2002.06015 for a batch size of the table.

    Args:
        batch_size: 4096, 8192, ..., 131072.
        samples: of the training set; an epoch is samples / batch_size steps, rounded.
        stale: statistics at every step, by the epoch (2019), or by the adaptive rule per statistic (2020).
        warmup_damping: the damping of 2019, 100 times higher at first, with a multiplier for BN; else constant.
        momentum_form: of `PolynomialDecay`.

    Raises:
        ConfigurationError: a batch size that the table does not have.

    """
    if batch_size not in OSAWA:
        raise ConfigurationError(f"expected a batch size of the table, {sorted(OSAWA)}, got {batch_size}")
    if stale not in ("none", "epoch", "adaptive"):
        raise ConfigurationError(f"expected stale 'none', 'epoch' or 'adaptive', got {stale!r}")
    ours = {
        "fallback": "parameters without a block: none in ResNet-50; SGD with the same momentum elsewhere",
        "weight_decay": "0: weights rescaling fixes the norms of Conv and Linear weights; no source names another",
    }
    if stale == "epoch":
        ours["osawa_growing"] = "min(20, 5 floor(epoch / 5) + 1), from memory: the formula was not retrievable"
    if stale == "adaptive":
        ours["first intervals"] = "1 and 1: not printed"
    if warmup_damping:
        ours["BN damping multiplier"] = f"{WARMUP[batch_size][0]:g}, from memory: Table 3 was not retrievable"
        ours["warm-up steps"] = f"{WARMUP[batch_size][1]}, from memory: Table 3 was not retrievable"
        ours["first damping"] = "100 times the target, from memory: Table 3 was not retrievable"
    steps_per_epoch = max(1, round(samples / batch_size))
    table = OSAWA[batch_size]
    return Osawa2019(batch_size, table, steps_per_epoch, stale, warmup_damping, momentum_form, ours)
