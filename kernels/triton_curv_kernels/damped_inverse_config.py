"""Configurations of `damped_inverse_` in Triton: which there are, which fit a problem, which is the default."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits

Precision = Literal["ieee", "tf32x3", "fp64"]
PRECISIONS: tuple[Precision, ...] = ("ieee", "tf32x3", "fp64")
PRODUCTS: tuple[Precision, ...] = ("ieee", "tf32x3")

SMALL = 32  # matrices up to this size are launched apart, in tiles of 16


@dataclass(frozen=True)
class DampedInverseProblem:
    """What the best configuration depends on: the size of the largest of the matrices, and the device's `limits`.

    `batch`: how many of that size are as much work as all of them.
    """

    n: int
    limits: DeviceLimits = NO_DEVICE
    batch: int = 1

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], limits: DeviceLimits = NO_DEVICE) -> "DampedInverseProblem":
        """Describe a launch over banks (batch, n), none of them empty."""
        largest = max(n for _, n in shapes)
        work = sum(batch * n**3 for batch, n in shapes)
        return cls(largest, limits, -(-work // largest**3))


@dataclass(frozen=True)
class DampedInverseConfig:
    """Tiles of BLOCK_N x BLOCK_N for the symmetric products, of BLOCK_M x BLOCK_N for the residual.

    `input_precision` is how the corrections X R and X R R are multiplied: "ieee" by fp32 units, "tf32x3" on NVIDIA's
    tensor cores. `residual_precision` is the same for I - X A, and may be "fp64": products of fp32 numbers, added up in
    fp64. Rounding in fp32 there limits ||I - A X|| to about 2^-24 kappa^2 in place of 2^-24 kappa, since X A is not
    symmetric but X is made so.
    """

    BLOCK_N: int = 64
    BLOCK_M: int = 32
    BLOCK_K: int = 32
    num_warps: int = 4
    num_stages: int = 2
    input_precision: Precision = "ieee"
    residual_precision: Precision = "fp64"

    def to_ints(self) -> list[int]:
        """The form in which a configuration goes through the op's schema."""
        tiling = [self.BLOCK_N, self.BLOCK_M, self.BLOCK_K, self.num_warps, self.num_stages]
        return [*tiling, *(PRECISIONS.index(p) for p in (self.input_precision, self.residual_precision))]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> "DampedInverseConfig":
        """Inverse of `to_ints`."""
        block_n, block_m, block_k, num_warps, num_stages, products, residual = values
        return cls(block_n, block_m, block_k, num_warps, num_stages, PRECISIONS[products], PRECISIONS[residual])


NUMERICS = ("BLOCK_N", "BLOCK_M", "BLOCK_K", "input_precision", "residual_precision")
"""The fields that change results: the order of sums and the products. All others give the same bits."""

CONFIGS: list[DampedInverseConfig] = [
    DampedInverseConfig(block_n, block_m, block_k, num_warps, num_stages, products, residual)
    for (block_n, block_m, num_warps), block_k, num_stages, products, residual in product(
        ((16, 16, 1), (32, 32, 4), (64, 32, 4), (64, 32, 8), (64, 64, 8)),
        (16, 32),
        (1, 2, 3),
        PRODUCTS,
        PRECISIONS,
    )
]


def has_fast_fp64(limits: DeviceLimits) -> bool:
    """Whether fp64 is at least half as fast as fp32: on NVIDIA's data-center GPUs, known by their shared memory.

    Those of AMD are fast as well, but Triton (3.6 to 3.7) can't compile products of fp64 for them.
    """
    return limits.platform == "cuda" and limits.shared_memory >= 160 * 1024


def prune(configs: Sequence[DampedInverseConfig], problem: DampedInverseProblem) -> list[DampedInverseConfig]:
    """The configurations that fit the device and make sense for the problem."""
    limits = problem.limits

    def fits(config: DampedInverseConfig) -> bool:
        wide = 2 if config.residual_precision == "fp64" else 1
        operands = 8 * wide * config.BLOCK_N * config.BLOCK_K * config.num_stages
        return (
            limits.shared_memory >= max(operands, 4 * config.BLOCK_N**2)
            and config.BLOCK_N % config.BLOCK_K == 0  # matrices are padded to a multiple of BLOCK_N
            and (config.BLOCK_N == 16 if problem.n <= 16 else config.BLOCK_N <= 32 or problem.n > 32)
            and (limits.platform == "cuda" or {config.input_precision, config.residual_precision} == {"ieee"})
            and (config.residual_precision != "fp64" or (has_fast_fp64(limits) and config.BLOCK_M <= 32))
        )

    return [config for config in configs if fits(config)]


def default_config(problem: DampedInverseProblem) -> DampedInverseConfig:
    """Analytic choice. It compiles without register spills for all targets the tests name.

    A residual in fp64 costs as much as one in fp32 on A100 and H100 (fp64 has tensor cores there, "ieee" fp32 has not),
    twice as much on B200.
    """
    cuda = problem.limits.platform == "cuda"
    residual: Precision = "fp64" if has_fast_fp64(problem.limits) else "ieee"
    if problem.n <= SMALL:
        return DampedInverseConfig(16, 16, 16, 1, 2 if cuda else 1, "ieee", residual)
    products: Precision = "tf32x3" if cuda else "ieee"
    return DampedInverseConfig(64, 32, 16, 8, 2, products, residual)
