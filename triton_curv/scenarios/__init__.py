"""Training tasks behind one small interface, and loaders of the papers' data formats."""

from triton_curv.scenarios.autoencoder import AUTOENCODER
from triton_curv.scenarios.bnn import BNN_MNIST
from triton_curv.scenarios.boston import REG_BOS, REG_BOS_FULL
from triton_curv.scenarios.cifar import load_cifar10
from triton_curv.scenarios.digits import DIGITS_CNN
from triton_curv.scenarios.errors import (
    DataFormatError,
    MissingDataError,
    ScenarioError,
    UnknownScenarioError,
)
from triton_curv.scenarios.gpt import TINY_GPT
from triton_curv.scenarios.imagenet import ImageFolder
from triton_curv.scenarios.life import REG_LIF, REG_LIF_FULL
from triton_curv.scenarios.mlp import MNIST_MLP
from triton_curv.scenarios.resnet import MNIST_RESNET, RESNET_TRANSFER
from triton_curv.scenarios.scenario import Data, Metric, Scenario
from triton_curv.scenarios.sine import SINE10, SINE100
from triton_curv.scenarios.vae import VAE_MNIST

_ALL = (
    *(DIGITS_CNN, REG_BOS, REG_BOS_FULL, REG_LIF, REG_LIF_FULL),
    *(MNIST_MLP, MNIST_RESNET, RESNET_TRANSFER, AUTOENCODER, VAE_MNIST, BNN_MNIST),
    *(TINY_GPT, SINE10, SINE100),
)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}


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
