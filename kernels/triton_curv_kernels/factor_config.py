"""Configurations of `accumulate_factor_` in Triton: which there are, which fit a problem, which is the default."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import triton
from torch import Tensor

from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits, device_limits

InputPrecision = Literal["ieee", "tf32x3"]
INPUT_PRECISIONS: tuple[InputPrecision, ...] = ("ieee", "tf32x3")


@dataclass(frozen=True)
class FactorProblem:
    """What the best configuration depends on: `batch` matrices rows (k, n) of `dtype` on a device with `limits`.

    `aligned`: n and the strides are multiples of 16 (or 1), which Triton compiles to wide loads.
    """

    batch: int
    k: int
    n: int
    dtype: torch.dtype
    ones: bool = False
    aligned: bool = True
    limits: DeviceLimits = NO_DEVICE

    @classmethod
    def of(cls, rows: Tensor, ones: bool) -> "FactorProblem":
        """Describe a call."""
        k, n = rows.shape[-2:]
        aligned = n % 16 == 0 and all(stride == 1 or stride % 16 == 0 for stride in rows.stride())
        batch = rows.shape[0] if rows.dim() == 3 else 1
        return cls(batch, k, n, rows.dtype, ones, aligned, device_limits(rows.device))


@dataclass(frozen=True)
class FactorConfig:
    """Tiles of BLOCK_N x BLOCK_N, BLOCK_K rows at a time, K cut into (at most) SPLIT_K parts.

    `input_precision` is how fp32 products are made: "ieee", or "tf32x3" on NVIDIA's tensor cores (three TF32
    products, error about 2^-21). Products of fp16 and bf16 are exact in fp32 either way.
    """

    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int = 1
    num_warps: int = 4
    num_stages: int = 3
    input_precision: InputPrecision = "ieee"

    def to_ints(self) -> list[int]:
        """The form in which a configuration goes through the op's schema."""
        tiling = [self.BLOCK_N, self.BLOCK_K, self.SPLIT_K, self.num_warps, self.num_stages]
        return [*tiling, INPUT_PRECISIONS.index(self.input_precision)]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> "FactorConfig":
        """Inverse of `to_ints`."""
        block_n, block_k, split_k, num_warps, num_stages, precision = values
        return cls(block_n, block_k, split_k, num_warps, num_stages, INPUT_PRECISIONS[precision])


SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
CONFIGS: list[FactorConfig] = [
    FactorConfig(block_n, block_k, split_k, num_warps, num_stages, precision)
    for (block_n, num_warps), block_k, split_k, num_stages, precision in product(
        ((16, 1), (32, 4), (64, 4), (64, 8), (128, 8)), (16, 32, 64), SPLITS, (2, 3, 4), INPUT_PRECISIONS
    )
]


def prune(configs: Sequence[FactorConfig], problem: FactorProblem) -> list[FactorConfig]:
    """The configurations that fit the device and make sense for the problem."""
    fp32 = problem.dtype == torch.float32

    def fits(config: FactorConfig) -> bool:
        operands = 2 * config.BLOCK_N * config.BLOCK_K * problem.dtype.itemsize * config.num_stages
        mirrored = 4 * config.BLOCK_N**2
        return (
            problem.limits.shared_memory >= max(operands, mirrored)
            and max(16, triton.next_power_of_2(problem.n)) >= config.BLOCK_N
            and (config.SPLIT_K == 1 or problem.k >= config.SPLIT_K * config.BLOCK_K)
            and (config.input_precision == "ieee" or (fp32 and problem.limits.platform == "cuda"))
            and (not fp32 or config.BLOCK_K <= 32)  # fp32 products are unrolled over BLOCK_K
        )

    return [config for config in configs if fits(config)]


def default_config(problem: FactorProblem) -> FactorConfig:
    """Analytic choice, of full fp32 precision. It compiles without register spills for all targets the tests name."""
    fp32, n = problem.dtype == torch.float32, problem.n
    if n <= 16:
        block_n, num_warps = 16, 1
    elif n <= 32:
        block_n, num_warps = 32, 4
    elif n < 512 or not problem.aligned:
        block_n, num_warps = 64, 4 if problem.aligned else 8
    else:
        block_n, num_warps = 128, 8
    block_k = 16 if fp32 else 32 if block_n == 16 else 64
    num_stages = 2 if problem.limits.platform == "hip" or (fp32 and block_n == 128) else 3
    return FactorConfig(block_n, block_k, _default_split(problem, block_n), num_warps, num_stages)


def _default_split(problem: FactorProblem, block_n: int) -> int:
    """The split that takes the fewest waves of programs, weighted by their length.

    A partial tile is taken for 2 % of a program, the second kernel for 10 %. Parts have 512 rows or more.
    """
    tiles = triton.cdiv(problem.n, block_n)
    programs = max(1, problem.batch * (tiles * (tiles + 1) // 2 + problem.ones * tiles))

    places = problem.limits.multiprocessors

    def duration(split: int) -> float:
        waves: int = triton.cdiv(programs * split, places)
        return waves / split * (1 + 0.02 * split + 0.1 * (split > 1))

    useful = (s for s in SPLITS if s == 1 or (512 * s <= problem.k and programs * s <= 8 * places))
    return min(useful, key=duration)
