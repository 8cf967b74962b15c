"""sine10 and sine100: y = sin(f x) + noise, a 1-20-20-20-1 sigmoid net, mean squared error (arXiv 2006.02409)."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios.scenario import Data, Scenario, rmse

TRAIN_ROWS, VAL_ROWS = 7000, 3000
NOISE = 0.01
"""Standard deviation of the noise, whose square is the floor of the loss."""


def load_sine(frequency: float) -> Data:
    """x uniform in (-1, 1), y = sin(frequency x) + N(0, 0.01^2), from a generator of its own: 7,000 and 3,000 rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(TRAIN_ROWS + VAL_ROWS, 1, generator=generator) * 2 - 1
    y = torch.sin(frequency * x) + NOISE * torch.randn(x.shape, generator=generator)
    return Data(x[:TRAIN_ROWS], y[:TRAIN_ROWS], x[TRAIN_ROWS:], y[TRAIN_ROWS:])


def sine_net() -> nn.Module:
    """1-20-20-20-1 with sigmoids, 901 parameters; weights N(0, 1), biases 0, as the authors have them."""
    widths = (1, 20, 20, 20)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    net = nn.Sequential(*layers, nn.Linear(20, 1))
    for p in net.parameters():
        nn.init.normal_(p) if p.dim() == 2 else nn.init.zeros_(p)
    return net


LEARNING_RATES = {
    "sgd": 3e-2,
    "adamw": 3e-2,
    "neumann": 3e-2,
    "kfac": 3e-2,
    "newton-cg": 1.0,
    "neumann-inner": 3e-2,
}

SINE10 = Scenario(
    name="sine10",
    summary="sin(10 x) + N(0, 0.01^2), 1-20-20-20-1 sigmoid, mean squared error",
    train_rows=TRAIN_ROWS,
    load=partial(load_sine, 10.0),
    model=sine_net,
    loss=F.mse_loss,
    metric=rmse("amplitudes"),
    batch_size=1000,
    budget=1000,
    evaluate_every=10,
    target_loss=0.393,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates=LEARNING_RATES,
    options={"sgn": {"cg_max_iter": 20}, "newton-cg": {"line_search": True}},
)

SINE100 = Scenario(
    name="sine100",
    summary="sin(100 x) + N(0, 0.01^2), 1-20-20-20-1 sigmoid, mean squared error",
    train_rows=TRAIN_ROWS,
    load=partial(load_sine, 100.0),
    model=sine_net,
    loss=F.mse_loss,
    metric=rmse("amplitudes"),
    batch_size=1000,
    budget=1000,
    evaluate_every=10,
    target_loss=0.4947,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates=LEARNING_RATES,
    options={"sgn": {"cg_max_iter": 30}, "newton-cg": {"line_search": True}},
)
