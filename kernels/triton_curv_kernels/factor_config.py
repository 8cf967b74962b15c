"""Configurations of `accumulate_factor_` in Triton: which there are, which fit a problem, which is the default."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import triton
from torch import Tensor

from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits, device_limits

InputPrecision = Literal["ieee", "tf32x3", "bf16x6"]
INPUT_PRECISIONS: tuple[InputPrecision, ...] = ("ieee", "tf32x3", "bf16x6")


@dataclass(frozen=True)
class FactorProblem:
    """What the best configuration depends on: `batch` matrices rows (k, n) of `dtype` on a device with `limits`.

    `aligned`: n and one stride are multiples of 16 bytes and the other stride is 1, which allows wide loads.
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
        aligned = has_wide_rows(rows) or has_wide_rows(rows.mT)
        batch = rows.shape[0] if rows.dim() == 3 else 1
        return cls(batch, k, n, rows.dtype, ones, aligned, device_limits(rows.device))


def has_wide_rows(rows: Tensor) -> bool:
    """Whether each row is contiguous and a multiple of 16 bytes long and apart from the next (the start is another)."""
    wide = 16 // rows.dtype.itemsize
    return rows.stride(-1) == 1 and rows.shape[-1] % wide == 0 and all(s % wide == 0 for s in rows.stride()[:-1])


@dataclass(frozen=True)
class FactorConfig:
    """Tiles of BLOCK_N x BLOCK_N, BLOCK_K rows at a time, K cut into (at most) SPLIT_K parts.

    `input_precision` is how fp32 products are made: "ieee" by fp32 units; on tensor cores "tf32x3" (three TF32
    products, error about 2^-21, NVIDIA only) or "bf16x6" (six products of three bf16 parts, about 2^-23). Products of
    fp16 and bf16 are exact in fp32 whatever it is.
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


NUMERICS = ("SPLIT_K", "BLOCK_K", "input_precision")
"""The fields that change results: the order of sums and the products. All others give the same bits."""

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
            and (config.input_precision == "ieee" or fp32)  # else it is the same kernel
            and (config.input_precision != "tf32x3" or problem.limits.platform == "cuda")
            and (config.input_precision != "bf16x6" or config.BLOCK_N <= 64)  # tensor memory of sm_100, registers
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
    elif not problem.aligned:
        block_n, num_warps = 64, 8
    elif prefers_large_tiles(n, fp32):
        block_n, num_warps = 128, 8
    else:
        block_n, num_warps = 64, 4
    block_k = 16 if fp32 else 32 if block_n == 16 else 64
    num_stages = 2 if problem.limits.platform == "hip" or fp32 else 3
    return FactorConfig(block_n, block_k, _default_split(problem, block_n), num_warps, num_stages)


def prefers_large_tiles(n: int, fp32: bool, large: int = 128, small: int = 64) -> bool:
    """Whether large tiles take less time than small ones, which waste less on the rim of an n x n triangle.

    A tile of 64 reads twice as much for a product: shared memory feeds tensor cores at about 0.55 of the rate that
    it has with tiles of 128, fp32 units at 0.85.
    """

    def area(block: int) -> int:
        tiles = -(-n // block)
        return tiles * (tiles + 1) // 2 * block**2

    return area(large) * (0.85 if fp32 else 0.55) <= area(small)


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
