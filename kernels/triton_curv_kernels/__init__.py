"""Triton kernels for curvature optimizers, each beside its plain-torch reference."""

from triton_curv_kernels.backend import BackendError, UnsupportedInputError
from triton_curv_kernels.cg import cg_direction_, cg_dot, cg_dots, cg_update_
from triton_curv_kernels.factor import accumulate_factor_
from triton_curv_kernels.momentum import momentum_update_
from triton_curv_kernels.neumann import neumann_update_
from triton_curv_kernels.symmetric import pack_symmetric, unpack_symmetric

__all__ = [
    # factors
    "accumulate_factor_",
    "pack_symmetric",
    "unpack_symmetric",
    # updates
    "momentum_update_",
    "neumann_update_",
    # vector recurrences of conjugate gradients
    "cg_direction_",
    "cg_dot",
    "cg_dots",
    "cg_update_",
    # errors
    "BackendError",
    "UnsupportedInputError",
]
