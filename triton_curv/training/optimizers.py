"""The optimizers to train and compare, by name; none decays the weights: all minimise the same loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from triton_curv.training.errors import SettingError

OptimizerFactory = Callable[..., Optimizer]
"""(model, learning rate, steps that the run will take, **the scenario's options for it) -> optimizer"""


def _sgd(model: nn.Module, lr: float, steps: int) -> Optimizer:
    del steps
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=True)


def _adamw(model: nn.Module, lr: float, steps: int) -> Optimizer:
    del steps
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, foreach=True)


def _neumann(model: nn.Module, lr: float, steps: int) -> Optimizer:
    from triton_curv import Neumann

    # The paper's 5 epochs of warm-up and first period of 10 are for hundreds of epochs; here a share of a short run.
    return Neumann(model.parameters(), lr=lr, warmup=max(10, steps // 20), period=max(1, steps // 2))


def _kfac(model: nn.Module, lr: float, steps: int, **options: Any) -> Optimizer:
    del steps
    from triton_curv import KFAC

    return KFAC(model, lr=lr, **options)


def _newton_cg(model: nn.Module, lr: float, steps: int, **options: Any) -> Optimizer:
    del steps
    from triton_curv import NewtonCG

    return NewtonCG(model, lr, product="reverse", **options)  # named, not measured: a run repeats bit for bit


def _sgn(model: nn.Module, lr: float, steps: int, **options: Any) -> Optimizer:
    del steps
    from triton_curv import SGN

    return SGN(model, lr, product="double_vjp", **options)  # as above


def _neumann_inner(model: nn.Module, lr: float, steps: int, **options: Any) -> Optimizer:
    del steps
    from triton_curv import NeumannInner

    return NeumannInner(model, lr, **options)


OPTIMIZERS: Mapping[str, OptimizerFactory] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "neumann": _neumann,
    "kfac": _kfac,
    "newton-cg": _newton_cg,
    "sgn": _sgn,
    "neumann-inner": _neumann_inner,
}

CLOSURES: Mapping[str, Literal["loss", "loss and output"]] = {
    "newton-cg": "loss",
    "sgn": "loss and output",
    "neumann-inner": "loss",
}
"""What the closure returns that `step` of some optimizers wants; the others take gradients."""


def get_optimizer(name: str) -> OptimizerFactory:
    """The factory called ``name``.

    Raises:
        SettingError: Where there is none.

    """
    try:
        return OPTIMIZERS[name]
    except KeyError:
        raise SettingError(f"expected an optimizer among {', '.join(OPTIMIZERS)}, got {name!r}") from None
