"""Training tasks on real data behind one small interface, and loaders of the papers' data formats."""

from triton_curv.scenarios.boston import REG_BOS
from triton_curv.scenarios.cifar import load_cifar10
from triton_curv.scenarios.digits import DIGITS_CNN
from triton_curv.scenarios.errors import (
    DataFormatError,
    MissingDataError,
    ScenarioError,
    UnknownScenarioError,
)
from triton_curv.scenarios.imagenet import ImageFolder
from triton_curv.scenarios.life import REG_LIF
from triton_curv.scenarios.scenario import Data, Metric, Scenario

SCENARIOS = {scenario.name: scenario for scenario in (DIGITS_CNN, REG_BOS, REG_LIF)}


def get_scenario(name: str) -> Scenario:
    """The scenario called ``name``.

    Raises:
        UnknownScenarioError: Where there is none.

    """
    try:
        return SCENARIOS[name]
    except KeyError:
        raise UnknownScenarioError(f"expected a scenario among {', '.join(SCENARIOS)}, got {name!r}") from None


__all__ = [
    "SCENARIOS",
    "Data",
    "DataFormatError",
    "ImageFolder",
    "Metric",
    "MissingDataError",
    "Scenario",
    "ScenarioError",
    "UnknownScenarioError",
    "get_scenario",
    "load_cifar10",
]
