"""Curvature optimizers for PyTorch that are worth their cost."""

from triton_curv.errors import (
    ConfigurationError,
    NoStatisticsError,
    StateMismatchError,
    TritonCurvError,
)
from triton_curv.optimizers.kfac import KFAC

__version__ = "0.1.0"

__all__ = [
    # optimizers
    "KFAC",
    # errors
    "ConfigurationError",
    "NoStatisticsError",
    "StateMismatchError",
    "TritonCurvError",
]
