"""What parameters without a curvature block are trained with: AdamW or SGD, as torch.optim has them."""

from collections.abc import MutableMapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

FallbackName = Literal["adamw", "sgd"]


class Fallback(Protocol):
    """A first-order rule for one parameter group; its state lies in the optimizer's `state[param]`."""

    defaults: dict[str, Any]

    def init_state(self, param: Parameter) -> dict[str, Tensor]:
        """State of one parameter before the first step."""

    def update(self, params: list[Parameter], state: MutableMapping[Any, Any], group: dict[str, Any]) -> None:
        """One step for the parameters, all of which have a gradient."""


class AdamWFallback:
    """`torch.optim.AdamW`."""

    defaults: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}  # noqa: RUF012  # read only

    def init_state(self, param: Parameter) -> dict[str, Tensor]:
        """step, exp_avg, exp_avg_sq."""
        return {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
        }

    def update(self, params: list[Parameter], state: MutableMapping[Any, Any], group: dict[str, Any]) -> None:
        """torch's own functional AdamW on the group's state."""
        adamw(
            list(params),
            [p.grad for p in params if p.grad is not None],
            [state[p]["exp_avg"] for p in params],
            [state[p]["exp_avg_sq"] for p in params],
            [],
            [state[p]["step"] for p in params],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


class SGDFallback:
    """`torch.optim.SGD` with momentum; its weight decay is the L2 term that torch's SGD has."""

    defaults: dict[str, Any] = {}  # noqa: RUF012  # read only

    def init_state(self, param: Parameter) -> dict[str, Tensor]:
        """momentum_buffer, and step for checkpoints."""
        return {
            "step": torch.tensor(0.0),
            "momentum_buffer": torch.zeros_like(param, memory_format=torch.preserve_format),
        }

    def update(self, params: list[Parameter], state: MutableMapping[Any, Any], group: dict[str, Any]) -> None:
        """torch's own functional SGD on the group's state."""
        for p in params:
            state[p]["step"] += 1
        sgd(
            list(params),
            [p.grad for p in params if p.grad is not None],
            [state[p]["momentum_buffer"] for p in params],
            foreach=True,
            weight_decay=group["weight_decay"],
            momentum=float(group["momentum"]),
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=group["maximize"],
        )


FALLBACKS: dict[str, Fallback] = {"adamw": AdamWFallback(), "sgd": SGDFallback()}
