"""Configurations of `pack_symmetric` and `unpack_symmetric` in Triton: which there are, which fit, the default."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits, is_blackwell


@dataclass(frozen=True)
class SymmetricProblem:
    """What the best configuration depends on: rows of the largest matrix, numbers of the buffer, and both dtypes.

    `dtype` is that of the matrices (the first one's, if there are several).
    """

    n: int
    numel: int
    dtype: torch.dtype
    packed_dtype: torch.dtype
    limits: DeviceLimits = NO_DEVICE


@dataclass(frozen=True)
class SymmetricConfig:
    """Programs handle BLOCK x BLOCK tiles of the lower triangle."""

    BLOCK: int = 64
    num_warps: int = 4


NUMERICS: tuple[str, ...] = ()
"""The fields that change results: none."""

CONFIGS: list[SymmetricConfig] = [SymmetricConfig(block, warps) for block in (16, 32, 64, 128) for warps in (2, 4, 8)]


def prune(configs: Sequence[SymmetricConfig], problem: SymmetricProblem) -> list[SymmetricConfig]:
    """Tiles no larger than half of the largest n x n matrix, with 4 to 32 elements a thread."""
    widest = max(16, triton.next_power_of_2((problem.n + 1) // 2))
    return [c for c in configs if widest >= c.BLOCK and c.BLOCK**2 // (32 * c.num_warps) in range(4, 33)]


def default_config(problem: SymmetricProblem) -> SymmetricConfig:
    """Analytic choice, by the largest matrix."""
    n = problem.n
    if n <= 32:
        return SymmetricConfig(16, 2)
    # on Blackwell, narrow copies of tiles of 64 spill
    return SymmetricConfig(32, 4) if n <= 512 or is_blackwell(problem.limits) else SymmetricConfig(64, 8)
