"""One captured backward of `triton_curv.KFAC`, with every interval at one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import triton_curv as tc


def kfac(model: nn.Module, **options: Any) -> tc.KFAC:
    """Return the optimizer that captures and inverts at every step."""
    return tc.KFAC(model, **{"factor_interval": 1, "inverse_interval": 1, "centred": False, **options})


def captured(model: nn.Module, loss: Callable[[nn.Module], Tensor], **options: Any) -> tc.KFAC:
    """Return the optimizer of `model` after one backward of `loss(model)`."""
    optimizer = kfac(model, **options)
    torch.autograd.backward(loss(model))
    return optimizer
