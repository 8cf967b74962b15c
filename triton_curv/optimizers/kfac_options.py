"""The settings of KFAC that hold for the whole model, checked: what is not a hyper-parameter of a parameter group."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from triton_curv.blocks.bank import FactorKey, FactorStore, Normalisation
from triton_curv.damping import ConstantDamping, DampingRule
from triton_curv.errors import ConfigurationError
from triton_curv.inverse import InverseName
from triton_curv.optimizers.fallback import FallbackName
from triton_curv.optimizers.fisher import FisherName
from triton_curv.optimizers.groups import choose
from triton_curv.schedules import GROWING, AdaptiveInterval, FixedInterval, RefreshSchedule

UpdateSize = Literal["matched", "rms", "kl_clip", "none"]
Reduction = Literal["mean", "sum"]
Rescale = Literal["none", "paper", "code"]
Even = Literal["even"]


@dataclass(frozen=True)
class KFACOptions:
    """How KFAC makes, inverts and applies curvature. Raises ConfigurationError for values out of range.

    The fields are arguments of `KFAC`, which documents them.
    """

    fisher: FisherName = "empirical"
    centred: bool = True
    fallback: FallbackName = "adamw"
    inverse: InverseName = "auto"
    inverse_tolerance: float = 1.5
    ekfac: bool = False
    update_size: UpdateSize = "matched"
    nesterov: bool = True
    kl_clip: float = 1e-3
    factor_decay: float = 0.95
    factor_interval: int | RefreshSchedule | AdaptiveInterval = GROWING
    inverse_interval: int | RefreshSchedule = GROWING
    refresh_budget: int | Even | None = None
    damping_rule: DampingRule = field(default_factory=ConstantDamping)
    rescale: Rescale = "none"
    reduction: Reduction = "mean"
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        choose("fisher", self.fisher, get_args(FisherName))
        choose("fallback", self.fallback, get_args(FallbackName))
        choose("inverse", self.inverse, get_args(InverseName))
        choose("update_size", self.update_size, get_args(UpdateSize))
        choose("rescale", self.rescale, get_args(Rescale))
        choose("reduction", self.reduction, get_args(Reduction))
        intervals = [i for i in (self.factor_interval, self.inverse_interval) if isinstance(i, int)]
        budget = self.refresh_budget
        if any(i < 1 for i in intervals) or (budget < 1 if isinstance(budget, int) else budget not in (None, "even")):
            raise ConfigurationError(
                "expected intervals of at least 1 step and a refresh_budget of at least 1 factor, 'even' or None, got "
                f"{self.factor_interval=}, {self.inverse_interval=}, {self.refresh_budget=}"
            )
        if not 0 <= self.factor_decay < 1 or not self.kl_clip > 0 or not self.loss_scale > 0:
            raise ConfigurationError(
                "expected factor_decay in [0, 1), kl_clip > 0 and loss_scale > 0, got "
                f"{self.factor_decay=}, {self.kl_clip=}, {self.loss_scale=}"
            )
        if not self.inverse_tolerance > 0:
            raise ConfigurationError(f"expected inverse_tolerance > 0, got {self.inverse_tolerance}")
        if self.centred and self.fisher != "empirical":
            raise ConfigurationError(f"expected fisher='empirical' with centred=True, got {self.fisher!r}")
        if self.ekfac and self.inverse != "eigen":
            raise ConfigurationError(f"expected inverse='eigen' with ekfac=True, got {self.inverse!r}")
        if self.ekfac and budget == "even":
            raise ConfigurationError(
                "expected a number or None as refresh_budget with ekfac=True, which takes statistics after each change "
                "of basis, got 'even'"
            )
        if self.adaptive is not None and (self.ekfac or self.refresh_budget is not None):
            raise ConfigurationError(
                "expected no ekfac and no refresh_budget with an AdaptiveInterval, which renews each inverse with its "
                f"statistic, got ekfac={self.ekfac}, refresh_budget={self.refresh_budget}"
            )

    def tolerance_on(self, device: torch.device, alone: bool) -> float | None:
        """What low-rank forms of inverses must keep; None for dense ones. `alone`: on one rank, and not compiled."""
        if self.inverse == "low_rank" and not alone:
            raise ConfigurationError(
                "expected inverse='auto' or another one on several ranks and with compile, got 'low_rank': its ranks "
                "are chosen on the host"
            )
        low = self.inverse == "low_rank" or (self.inverse == "auto" and alone and device.type == "cpu")
        return self.inverse_tolerance if low else None

    @property
    def averages(self) -> bool:
        """Whether the momentum is an average of steps, with bias correction, rather than their sum."""
        return self.update_size in ("matched", "rms")

    @property
    def adaptive(self) -> AdaptiveInterval | None:
        """The rule per statistic, if there is one."""
        return self.factor_interval if isinstance(self.factor_interval, AdaptiveInterval) else None

    def steps_to_next_fold(self, step: int) -> int:
        """From a fold at `step`; 1 for the adaptive rule, which looks at every statistic at every step."""
        chosen = self.factor_interval
        if isinstance(chosen, AdaptiveInterval):
            return 1
        return (FixedInterval(chosen) if isinstance(chosen, int) else chosen).interval(step)

    def steps_to_next_inverse(self, step: int) -> int:
        """From a renewal of the inverses at `step`."""
        chosen = self.inverse_interval
        return (FixedInterval(chosen) if isinstance(chosen, int) else chosen).interval(step)

    def normalisation(self, signal_scale: float | Tensor) -> Normalisation:
        """How sums become statistics. Sampled signals are per unit: they carry neither a mean nor a scale."""
        if self.fisher == "empirical":
            return Normalisation(self.factor_decay, self.loss_scale * signal_scale, self.reduction == "sum")
        return Normalisation(self.factor_decay, 1.0, summed=True)


def refresh_parts(store: FactorStore, budget: int | Even | None) -> list[list[FactorKey]]:
    """The factors in parts of at most `budget`, of about equal work (n^3): one part is inverted in one step."""
    if not isinstance(budget, int):
        return [list(store.keys)]
    work = {key: len(view) * view.shape[-1] ** 3 for key in store.keys for view in [store.view("sums", key)]}
    parts: list[list[FactorKey]] = [[] for _ in range(-(-len(store.keys) // budget))]
    for key in sorted(store.keys, key=lambda k: -work[k]):
        open_parts = [part for part in parts if len(part) < budget]
        min(open_parts, key=lambda part: sum(work[k] for k in part)).append(key)
    return parts


def due_blocks(keys: Sequence[FactorKey], due: Sequence[bool]) -> set[int]:
    """Blocks of which some statistic is due."""
    return {key.block for key, is_due in zip(keys, due, strict=True) if is_due}
