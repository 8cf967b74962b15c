"""Curvature optimizers for PyTorch that are worth their cost."""

from triton_curv import augment, nvtx, recipes, schedules
from triton_curv.blocks import register_block
from triton_curv.damping import ConstantDamping, DampingRule, LevenbergMarquardt, ScheduledDamping, WarmupDamping
from triton_curv.errors import (
    ConfigurationError,
    EvaluationModeError,
    NoStatisticsError,
    SparseGradientError,
    StateMismatchError,
    TritonCurvError,
)
from triton_curv.health import NumericalWarning
from triton_curv.operators.errors import ClosureError, NoGraphError, NonFiniteError, UnsupportedOpError
from triton_curv.optimizers.kfac import KFAC
from triton_curv.optimizers.neumann import Neumann
from triton_curv.optimizers.neumann_inner import NeumannInner
from triton_curv.optimizers.newton_cg import NewtonCG
from triton_curv.optimizers.sgn import SGN
from triton_curv.schedules import AdaptiveInterval, EpochInterval, GrowingInterval, PolynomialDecay
from triton_curv.sharding.options import Sharding
from triton_curv_autotune import install as _install_chooser

__version__ = "0.1.0"

_install_chooser()  # kernels ask the tuner's tables: a function is set, nothing is read

__all__ = [
    # optimizers
    "KFAC",
    "SGN",
    "Neumann",
    "NeumannInner",
    "NewtonCG",
    # layers
    "register_block",
    # damping
    "ConstantDamping",
    "DampingRule",
    "LevenbergMarquardt",
    "ScheduledDamping",
    "WarmupDamping",
    # ranks
    "Sharding",
    # schedules
    "AdaptiveInterval",
    "EpochInterval",
    "GrowingInterval",
    "PolynomialDecay",
    # rooms of their own
    "augment",
    "nvtx",
    "recipes",
    "schedules",
    # errors and warnings
    "NumericalWarning",
    "ClosureError",
    "ConfigurationError",
    "EvaluationModeError",
    "NoGraphError",
    "NoStatisticsError",
    "NonFiniteError",
    "SparseGradientError",
    "StateMismatchError",
    "TritonCurvError",
    "UnsupportedOpError",
]

nvtx.enable_if_asked()
