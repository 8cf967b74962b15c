"""Configurations of `accumulate_factors_` in Triton: which there are, which fit a list, which is the default."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton

from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits, is_blackwell
from triton_curv_kernels.factor_config import INPUT_PRECISIONS, InputPrecision, prefers_large_tiles

MOST_PARTS = 64  # of one K: a finishing program adds them one after another


@dataclass(frozen=True)
class GroupProblem:
    """What the best configuration depends on: the matrices of one `dtype`, on a device with `limits`.

    `shapes`: (k, n, how many are so). `ones`: some have a column of ones; `packed`: some factors are packed; `aligned`:
    all rows allow wide loads.
    """

    shapes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    limits: DeviceLimits = NO_DEVICE
    ones: bool = False
    packed: bool = False
    aligned: bool = True

    @staticmethod
    def count(shapes: Iterable[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
        """`shapes` of matrices (k, n), in whatever order."""
        return tuple(sorted((k, n, count) for (k, n), count in Counter(shapes).items()))


@dataclass(frozen=True)
class GroupConfig:
    """Tiles of BLOCK_N or, for small and unaligned matrices, SMALL_N; BLOCK_K rows at a time.

    K is cut into parts of about PART_K rows, which makes programs of like length out of layers of unlike size.
    `input_precision` as in `FactorConfig`.
    """

    BLOCK_N: int
    SMALL_N: int
    BLOCK_K: int
    PART_K: int
    num_warps: int = 8
    num_stages: int = 3
    input_precision: InputPrecision = "ieee"

    def to_ints(self) -> list[int]:
        """The form in which a configuration goes through the op's schema."""
        tiling = [self.BLOCK_N, self.SMALL_N, self.BLOCK_K, self.PART_K, self.num_warps, self.num_stages]
        return [*tiling, INPUT_PRECISIONS.index(self.input_precision)]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> "GroupConfig":
        """Inverse of `to_ints`."""
        block_n, small_n, block_k, part_k, num_warps, num_stages, precision = values
        return cls(block_n, small_n, block_k, part_k, num_warps, num_stages, INPUT_PRECISIONS[precision])


GROUP_NUMERICS = ("PART_K", "BLOCK_K", "input_precision")
"""The fields that change results: the order of sums and the products. All others give the same bits."""

PARTS_K = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
GROUP_CONFIGS: list[GroupConfig] = [
    GroupConfig(block_n, 64, block_k, part_k, num_warps, num_stages, precision)
    for (block_n, num_warps), block_k, part_k, num_stages, precision in product(
        ((128, 4), (128, 8), (64, 4), (64, 8)), (16, 32, 64), PARTS_K, (2, 3, 4), INPUT_PRECISIONS
    )
]


def parts_of(k: int, config: GroupConfig) -> tuple[int, int]:
    """Parts that K is cut into, one at least, and rows of each but the last: a multiple of BLOCK_K."""
    steps = triton.cdiv(k, config.BLOCK_K)
    parts = min(MOST_PARTS, max(1, triton.cdiv(k, config.PART_K)))
    rows = max(1, triton.cdiv(steps, parts)) * config.BLOCK_K
    return max(1, triton.cdiv(k, rows)), rows


def prune_group(configs: Sequence[GroupConfig], problem: GroupProblem) -> list[GroupConfig]:
    """The configurations that fit the device and make sense for the list."""
    fp32 = problem.dtype == torch.float32
    longest = max((k for k, *_ in problem.shapes), default=0)

    def fits(config: GroupConfig) -> bool:
        operands = 2 * config.BLOCK_N * config.BLOCK_K * problem.dtype.itemsize * config.num_stages
        return (
            problem.limits.shared_memory >= max(operands, 4 * config.BLOCK_N**2)
            and max(PARTS_K[0], longest) >= config.PART_K
            and (config.input_precision == "ieee" or fp32)  # else it is the same kernel
            and (config.input_precision != "tf32x3" or problem.limits.platform == "cuda")
            and (config.input_precision != "bf16x6" or config.BLOCK_N <= 64)  # tensor memory of sm_100, registers
            and (not fp32 or config.BLOCK_K <= 32)  # fp32 products are unrolled over BLOCK_K
            and ((config.BLOCK_N, config.num_warps) != (128, 4) or (is_blackwell(problem.limits) and not fp32))
        )

    return [config for config in configs if fits(config)]


def default_group_config(problem: GroupProblem) -> GroupConfig:
    """Analytic choice, of full fp32 precision. It compiles without register spills for all targets the tests name."""
    fp32, hip = problem.dtype == torch.float32, problem.limits.platform == "hip"
    block_k = 64 if not fp32 else 32 if hip else 16  # of 16, gfx942 spills where packed factors are stored at once
    num_stages = 2 if hip or fp32 else 3

    def config(part_k: int) -> GroupConfig:
        return GroupConfig(128, 64, block_k, part_k, 8, num_stages)

    def duration(part_k: int) -> float:
        """Rows of large tiles that the busiest multiprocessor multiplies; a partial tile takes 500 rows' time."""
        total = longest = 0.0
        for k, n, count in problem.shapes:
            block = 128 if prefers_large_tiles(n, fp32) else 64
            tiles = triton.cdiv(n, block)
            parts, rows = parts_of(k, config(part_k))
            one = (rows + 500 * (parts > 1)) * (1.0 if block == 128 else 0.45)
            longest = max(longest, one)
            total += count * tiles * (tiles + 1) / 2 * parts * one
        return total / problem.limits.multiprocessors + longest

    chosen = config(min(PARTS_K, key=duration))
    if is_blackwell(problem.limits) and not fp32 and any(parts_of(k, chosen)[0] > 1 for k, *_ in problem.shapes):
        return replace(chosen, num_warps=4)  # of 8, threads have 128 registers; to store factors at once takes 8
    return chosen
