"""digits-cnn: the scikit-learn digits, a small conv-BN-ReLU net, cross-entropy."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios.errors import MissingDataError
from triton_curv.scenarios.scenario import ACCURACY, Data, Scenario


def load_digits() -> Data:
    """8x8 grey images of ten digits, standardised: 1,437 training and 360 validation rows, stratified.

    Raises:
        MissingDataError: Where scikit-learn is not installed.

    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise MissingDataError("scikit-learn", "digits-cnn") from error
    images, classes = datasets.load_digits(return_X_y=True)
    train_x, val_x, train_y, val_y = model_selection.train_test_split(
        images / 16.0, classes, test_size=0.2, random_state=0, stratify=classes
    )
    mean, std = train_x.mean(), train_x.std()

    def pictures(rows: object) -> torch.Tensor:
        standardised: torch.Tensor = (torch.as_tensor(rows, dtype=torch.float32) - mean) / std
        return standardised.reshape(-1, 1, 8, 8)

    def labels(rows: object) -> torch.Tensor:
        return torch.as_tensor(rows, dtype=torch.int64)

    return Data(pictures(train_x), labels(train_y), pictures(val_x), labels(val_y))


def digits_cnn() -> nn.Module:
    """Bias-free 3x3 convolutions to 16, 32 (stride 2), 32 channels, each with BN and ReLU; a linear layer."""

    def block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 1), *block(16, 32, 2), *block(32, 32, 1), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)
    )


DIGITS_CNN = Scenario(
    name="digits-cnn",
    summary="scikit-learn digits, conv-BN-ReLU x 3 (16, 32/2, 32) + linear, cross-entropy",
    train_rows=1437,
    load=load_digits,
    model=digits_cnn,
    loss=F.cross_entropy,
    metric=ACCURACY,
    batch_size=128,
    budget=100,
    evaluate_every=2,
    target_loss=0.00292,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 1e-1,
        "adamw": 1e-2,
        "neumann": 1e-1,
        "kfac": 3e-2,
        "newton-cg": 1e-1,
        "neumann-inner": 3e-2,
    },
)
