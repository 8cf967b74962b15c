"""How the work of K-FAC is shared out over ranks: what a user may choose."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from triton_curv.errors import ConfigurationError
from triton_curv.sharding.exchange import Collectives

Gather = Literal["gradients", "inverses"]
GradientReduction = Literal["auto", "all_reduce", "reduce_scatter"]
WIRES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sharding:
    """How K-FAC is shared out over the ranks of its process group.

    Args:
        gather: "gradients": one rank holds a layer's inverses, preconditions it and sends the result to the others (the
            paper; least memory). "inverses": all ranks get all inverses whenever these are renewed, and precondition
            everything (least communication between renewals).
        grad_worker_fraction: between the two: the share of ranks that hold a layer's inverses, rounded to the nearest
            divisor of their number (KAISA, arXiv 2107.01739). None: what `gather` says.
        wire: dtype of factors, inverses and preconditioned gradients on the way: float32, bfloat16 or float16; None:
            as they are. Factors are scaled to a mean eigenvalue of 1 before they become float16.
        gradients: who averages the gradients. "auto": DDP or FSDP if the model is wrapped, else "reduce_scatter".
            "reduce_scatter": each gradient goes to the rank that preconditions it and to no other; under DDP its
            all-reduce is switched off by a communication hook, and `p.grad` stays this rank's own. "all_reduce": all
            ranks get all, as DDP does it.
        overlap: send the factors A while the backward pass goes on. The last backward pass of a step must be the only
            one outside DDP's `no_sync`; others are found out, and what was sent too early is sent again.
        bucket_mib: MiB of factors that leave together when they overlap.
        collectives: see `triton_curv.sharding.exchange.Channel`.

    Raises:
        ConfigurationError: a value out of range.

    """

    gather: Gather = "gradients"
    grad_worker_fraction: float | None = None
    wire: torch.dtype | None = None
    gradients: GradientReduction = "auto"
    overlap: bool = True
    bucket_mib: int = 25
    collectives: Collectives = "fewest"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("gather", self.gather, get_args(Gather)),
            ("gradients", self.gradients, get_args(GradientReduction)),
            ("collectives", self.collectives, get_args(Collectives)),
            ("wire", self.wire, (None, *WIRES)),
        ):
            if value not in allowed:
                raise ConfigurationError(f"expected {name} to be one of {list(allowed)}, got {value!r}")
        if not 0 <= self.fraction <= 1 or self.bucket_mib < 1:
            raise ConfigurationError(
                "expected grad_worker_fraction in [0, 1] and bucket_mib >= 1, got "
                f"{self.grad_worker_fraction} and {self.bucket_mib}"
            )

    @property
    def fraction(self) -> float:
        """Share of ranks that precondition a layer; 0 stands for one rank."""
        if self.grad_worker_fraction is not None:
            return self.grad_worker_fraction
        return float(self.gather == "inverses")
