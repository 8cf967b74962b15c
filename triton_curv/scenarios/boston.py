"""reg-bos: Boston housing, a 13-64-64-1 ReLU net, mean squared error; reg-bos-fb: the same, full batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios.errors import MissingDataError
from triton_curv.scenarios.scenario import Data, Scenario, rmse
from triton_curv.scenarios.split import regression_data


def load_boston() -> Data:
    """13 features of 506 districts, target MEDV, all standardised: 404 training and 102 validation rows.

    Raises:
        MissingDataError: Where mlxtend is not installed.

    """
    try:
        from mlxtend.data import boston_housing_data
    except ImportError as error:
        raise MissingDataError("mlxtend", "reg-bos") from error
    features, target = boston_housing_data()
    return regression_data(features, np.empty((len(target), 0)), target, train_rows=404)


def boston_net() -> nn.Module:
    """13-64-64-1 with ReLU."""
    return nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


REG_BOS = Scenario(
    name="reg-bos",
    summary="Boston housing (mlxtend), 13-64-64-1 ReLU, mean squared error on standardised MEDV",
    train_rows=404,
    load=load_boston,
    model=boston_net,
    loss=F.mse_loss,
    metric=rmse("1000 $"),
    batch_size=32,
    budget=300,
    evaluate_every=3,
    target_loss=0.0636,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 3e-2,
        "adamw": 5.6e-3,
        "neumann": 3e-2,
        "kfac": 3e-2,
        "newton-cg": 3e-2,
        "neumann-inner": 3e-2,
    },
    options={
        "newton-cg": {"hessian": "per_tensor"},  # what the authors' Keras path does
        "sgn": {"cg_max_iter": 5, "damping": 1.0, "damping_min": 0.1},  # a small batch is easily fitted too well
    },
)

REG_BOS_FULL = replace(
    REG_BOS,
    name="reg-bos-fb",
    summary="reg-bos with all rows in every batch",
    batch_size=404,
    budget=150,
    evaluate_every=2,
    target_loss=0.0317,  # as above
    learning_rates={
        "sgd": 1e-1,
        "adamw": 1e-2,
        "neumann": 1e-1,
        "kfac": 3e-2,
        "newton-cg": 3.0,
        "neumann-inner": 3e-2,
    },
    options={"newton-cg": {"line_search": True, "cg_max_iter": 50}, "sgn": {"cg_max_iter": 50}},
)
