"""Matrix-free curvature: Hessian- and Gauss-Newton-vector products, and conjugate gradients on them."""

from triton_curv.operators.cg import CGResult, StoppingRule, cg
from triton_curv.operators.errors import ClosureError, NoGraphError, NonFiniteError, UnsupportedOpError
from triton_curv.operators.frozen import FrozenClosure
from triton_curv.operators.ggn import GaussNewtonOperator, ggn_vp
from triton_curv.operators.hvp import HessianOperator, hvp

__all__ = [
    # products
    "FrozenClosure",
    "GaussNewtonOperator",
    "HessianOperator",
    "ggn_vp",
    "hvp",
    # solvers
    "CGResult",
    "StoppingRule",
    "cg",
    # errors
    "ClosureError",
    "NoGraphError",
    "NonFiniteError",
    "UnsupportedOpError",
]
