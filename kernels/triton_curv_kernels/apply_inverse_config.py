"""Configurations of `apply_damped_inverse` in Triton: which there are, which fit a problem, which is the default."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

import torch

from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits

Precision = Literal["ieee", "tf32x3"]
PRECISIONS: tuple[Precision, ...] = ("ieee", "tf32x3")


@dataclass(frozen=True)
class ApplyProblem:
    """What the best configuration depends on: elements of the gradients in all, their dtype, the device's `limits`.

    `side`: of square gradients that take as many products for each element as these do on average. `aligned`: rows and
    columns of all are multiples of 16 bytes.
    """

    numel: int
    dtype: torch.dtype
    limits: DeviceLimits = NO_DEVICE
    side: int = 256
    aligned: bool = True

    @classmethod
    def of(
        cls, shapes: Sequence[tuple[Sequence[int], bool]], dtype: torch.dtype, limits: DeviceLimits = NO_DEVICE
    ) -> "ApplyProblem":
        """Describe a launch over gradients, by shape (..., r, c) and whether there are two factors."""
        numel = products = 0
        for shape, is_pair in shapes:
            elements, (r, c) = prod(shape), shape[-2:]
            numel += elements
            products += elements * ((r + c) // 2 if is_pair else r)
        vector = 16 // dtype.itemsize
        aligned = all(size % vector == 0 for shape, _ in shapes for size in shape[-2:])
        return cls(numel, dtype, limits, products // max(1, numel), aligned)


@dataclass(frozen=True)
class ApplyConfig:
    """Tiles of BLOCK x BLOCK, BLOCK_K columns at a time; `input_precision` is how fp32 products are made.

    "tf32x3" is three products on NVIDIA's tensor cores with an error of about 2^-21. It does not matter for fp16, bf16.
    """

    BLOCK: int = 64
    BLOCK_K: int = 32
    num_warps: int = 4
    num_stages: int = 3
    input_precision: Precision = "ieee"

    def to_ints(self) -> list[int]:
        """The form in which a configuration goes through the op's schema."""
        tiling = [self.BLOCK, self.BLOCK_K, self.num_warps, self.num_stages]
        return [*tiling, PRECISIONS.index(self.input_precision)]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> "ApplyConfig":
        """Inverse of `to_ints`."""
        block, block_k, num_warps, num_stages, precision = values
        return cls(block, block_k, num_warps, num_stages, PRECISIONS[precision])


NUMERICS = ("BLOCK", "BLOCK_K", "input_precision")
"""The fields that change results: the order of sums and the products. All others give the same bits."""

CONFIGS: list[ApplyConfig] = [
    ApplyConfig(block, block_k, num_warps, num_stages, precision)
    for (block, num_warps), block_k, num_stages, precision in product(
        ((16, 1), (32, 4), (64, 4), (64, 8), (128, 8)), (16, 32, 64), (2, 3, 4), PRECISIONS
    )
]


def prune(configs: Sequence[ApplyConfig], problem: ApplyProblem) -> list[ApplyConfig]:
    """The configurations that fit the device and make sense for the problem."""
    fp32, limits = problem.dtype == torch.float32, problem.limits

    def fits(config: ApplyConfig) -> bool:
        operands = 2 * config.BLOCK * config.BLOCK_K * problem.dtype.itemsize * config.num_stages
        return (
            limits.shared_memory >= operands
            and (config.input_precision == "ieee" or (fp32 and limits.platform == "cuda"))
            and (not fp32 or config.BLOCK_K <= 32)  # fp32 products are unrolled over BLOCK_K
            and (not fp32 or config.BLOCK <= 64)  # registers
        )

    return [config for config in configs if fits(config)]


def default_config(problem: ApplyProblem) -> ApplyConfig:
    """Analytic choice. It compiles without register spills for all targets the tests name."""
    cuda = problem.limits.platform == "cuda"
    if problem.dtype == torch.float32:
        return ApplyConfig(64, 16, 8, 3 if cuda else 2, "tf32x3" if cuda else "ieee")
    return ApplyConfig(64, 64, 8, 3 if cuda else 2)
