"""Curvature optimizers for PyTorch that are worth their cost."""

from triton_curv.errors import (
    ConfigurationError,
    EvaluationModeError,
    NoStatisticsError,
    SparseGradientError,
    StateMismatchError,
    TritonCurvError,
)
from triton_curv.optimizers.kfac import KFAC
from triton_curv.optimizers.neumann import Neumann

__version__ = "0.1.0"

__all__ = [
    # optimizers
    "KFAC",
    "Neumann",
    # errors
    "ConfigurationError",
    "EvaluationModeError",
    "NoStatisticsError",
    "SparseGradientError",
    "StateMismatchError",
    "TritonCurvError",
]
