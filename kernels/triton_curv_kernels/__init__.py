"""Triton kernels for curvature optimizers, each beside its plain-torch reference."""

from triton_curv_kernels.apply_inverse import Applied, apply_damped_inverse
from triton_curv_kernels.backend import BackendError, UnsupportedInputError
from triton_curv_kernels.cg import cg_direction_, cg_dot, cg_dots, cg_update_
from triton_curv_kernels.damped_inverse import damped_inverse_
from triton_curv_kernels.factor import accumulate_factor_
from triton_curv_kernels.factor_group import accumulate_factors_
from triton_curv_kernels.momentum import momentum_update_
from triton_curv_kernels.neumann import neumann_update_
from triton_curv_kernels.packed import from_dense, packed_offsets, to_dense
from triton_curv_kernels.patch import accumulate_patch_factor_
from triton_curv_kernels.symmetric import pack_symmetric, unpack_symmetric, unpack_symmetric_

__all__ = [
    # factors
    "accumulate_factor_",
    "accumulate_factors_",
    # packed symmetric matrices: a list in one launch; one, dense and back
    "accumulate_patch_factor_",
    "pack_symmetric",
    "unpack_symmetric",
    "unpack_symmetric_",
    "packed_offsets",
    "from_dense",
    "to_dense",
    # damped inverses
    "Applied",
    "apply_damped_inverse",
    "damped_inverse_",
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
