"""Configurations of `accumulate_patch_factor_` in Triton: which there are, which fit a problem, the default."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Literal

import torch
import triton
from torch import Tensor

from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits, device_limits, is_blackwell
from triton_curv_kernels.factor_config import INPUT_PRECISIONS, SPLITS, InputPrecision
from triton_curv_kernels.patch_geometry import PatchGeometry

Algorithm = Literal["gather", "implicit", "displacement"]
ALGORITHMS: tuple[Algorithm, ...] = ("gather", "implicit", "displacement")

WORKSPACE_SHARE = 0.05  # of the bytes that patches would take: what a workspace may take at most
COPY_SHARE = 0.5 * WORKSPACE_SHARE  # the same of copies of the input, and of the workspace beside them
SMALL_INPUT = 1 << 20  # bytes: less is read in place, whatever its layout, since each copy has launches of its own


@dataclass(frozen=True)
class PatchProblem:
    """What the best configuration depends on: samples, channels of a group, groups, and where the patches lie.

    `aligned`: the number of channels and all strides but theirs, which is 1, are multiples of 16, which Triton compiles
    to wide loads. That is meant for the copy if the input is one of those that are copied (`samples_of_part`).
    """

    samples: int
    per_group: int
    groups: int
    geometry: PatchGeometry
    dtype: torch.dtype
    ones: bool = False
    aligned: bool = True
    limits: DeviceLimits = NO_DEVICE

    @classmethod
    def of(cls, input: Tensor, groups: int, geometry: PatchGeometry, ones: bool) -> "PatchProblem":
        """Describe a call."""
        samples, per_group = int(input.shape[0]), int(input.shape[1]) // groups
        strides = [stride for size, stride in zip(input.shape, input.stride(), strict=True) if size > 1]
        narrow = [stride for stride in strides if stride % 16]
        limits = device_limits(input.device)
        problem = cls(samples, per_group, groups, geometry, input.dtype, ones, per_group % 16 == 0, limits)
        is_wide = narrow == [1] if input.stride(1) == 1 else samples_of_part(problem) > 0
        return replace(problem, aligned=problem.aligned and is_wide)

    @property
    def n(self) -> int:
        """Numbers of a patch."""
        return self.geometry.kernel_positions * self.per_group

    @property
    def rows(self) -> int:
        """Patches of a group."""
        return self.samples * self.geometry.positions

    @property
    def patch_bytes(self) -> int:
        """What all patches would take."""
        return self.groups * self.rows * self.n * self.dtype.itemsize


@dataclass(frozen=True)
class PatchConfig:
    """How products are shared out (`algorithm`), tiles of BLOCK_N x BLOCK_N, BLOCK_K pixels at a time, SPLIT_K parts.

    "implicit": a product of channels for each pair of kernel positions, over the pixels where both see the image.
    "displacement": one for each difference of two kernel positions, and small ones for the boundary; stride 1 only.
    "gather": tiles go across kernel positions and addresses are made element by element; for few channels.
    `input_precision` as in `FactorConfig`.
    """

    algorithm: Algorithm
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int = 1
    num_warps: int = 4
    num_stages: int = 3
    input_precision: InputPrecision = "ieee"

    def to_ints(self) -> list[int]:
        """The form in which a configuration goes through the op's schema."""
        tiling = [self.BLOCK_N, self.BLOCK_K, self.SPLIT_K, self.num_warps, self.num_stages]
        return [ALGORITHMS.index(self.algorithm), *tiling, INPUT_PRECISIONS.index(self.input_precision)]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> "PatchConfig":
        """Inverse of `to_ints`."""
        algorithm, block_n, block_k, split_k, num_warps, num_stages, precision = values
        precision_name = INPUT_PRECISIONS[precision]
        return cls(ALGORITHMS[algorithm], block_n, block_k, split_k, num_warps, num_stages, precision_name)

    def programs(self, problem: PatchProblem) -> int:
        """Programs of one part of K: tiles of all products, and blocks of the row of ones."""
        geometry, positions = problem.geometry, problem.geometry.kernel_positions
        if self.algorithm == "gather":
            tiles = triton.cdiv(problem.n, self.BLOCK_N)
            per_group = tiles * (tiles + 1) // 2 + (max(tiles, 1) if problem.ones else 0)
        else:
            tiles = max(1, triton.cdiv(problem.per_group, self.BLOCK_N))
            pairs = positions * (positions + 1) // 2
            differences = (prod(2 * k - 1 for k in geometry.kernel) + 1) // 2
            products = differences if self.algorithm == "displacement" else pairs
            per_group = products * tiles**2 + (positions * tiles if problem.ones else 0)
        return int(problem.groups * per_group)

    def workspace(self, problem: PatchProblem) -> int:
        """Elements of fp32: a tile for each program, if K is split."""
        return self.programs(problem) * self.SPLIT_K * self.BLOCK_N**2 if self.SPLIT_K > 1 else 0


NUMERICS = ("algorithm", "BLOCK_N", "BLOCK_K", "SPLIT_K", "input_precision")
"""Fields that change the order or the rounding of sums; BLOCK_N since small tiles take another matrix instruction."""

TILES = ((16, 1), (32, 4), (64, 4), (64, 8), (128, 8))
GATHERED = ((16, 4), (32, 8))
"""BLOCK_N and warps; GATHERED: of "gather" on AMD, whose address for each element takes scalar registers."""

CONFIGS: list[PatchConfig] = [
    PatchConfig(algorithm, block_n, block_k, split_k, num_warps, num_stages, precision)
    for algorithm, (block_n, num_warps), block_k, split_k, num_stages, precision in product(
        ALGORITHMS, (*TILES, *GATHERED), (16, 32, 64), SPLITS, (2, 3, 4), INPUT_PRECISIONS
    )
]


def prune(configs: Sequence[PatchConfig], problem: PatchProblem) -> list[PatchConfig]:
    """The configurations that fit the device and make sense for the problem."""
    fp32 = problem.dtype == torch.float32

    def fits(config: PatchConfig) -> bool:
        operands = 2 * config.BLOCK_N * config.BLOCK_K * problem.dtype.itemsize * config.num_stages
        mirrored = 4 * config.BLOCK_N**2
        columns = problem.n if config.algorithm == "gather" else problem.per_group
        gathered = config.algorithm == "gather" and problem.limits.platform == "hip"
        return (
            problem.limits.shared_memory >= max(operands, mirrored)
            and max(16, triton.next_power_of_2(columns)) >= config.BLOCK_N
            and (config.SPLIT_K == 1 or problem.rows >= config.SPLIT_K * config.BLOCK_K)
            and 4 * config.workspace(problem) <= WORKSPACE_SHARE * problem.patch_bytes
            and (config.input_precision == "ieee" or (fp32 and problem.limits.platform == "cuda"))
            and (not fp32 or config.BLOCK_K <= 32)  # fp32 products are unrolled over BLOCK_K
            and (config.algorithm != "displacement" or problem.geometry.shares_displacements)
            and (config.algorithm != "gather" or (config.BLOCK_N <= 64 and config.BLOCK_K <= 32))  # an address each
            and ((config.BLOCK_N, config.num_warps) not in GATHERED or gathered)
        )

    return [config for config in configs if fits(config)]


@lru_cache(maxsize=1024)
def default_config(problem: PatchProblem) -> PatchConfig:
    """Analytic choice, of full fp32 precision: the shortest by `_duration` of those with a small workspace.

    It compiles without register spills for all targets the tests name.
    """
    return _shortest(problem, gathers=problem.per_group < 16)


@lru_cache(maxsize=1024)
def config_in_place(problem: PatchProblem) -> PatchConfig:
    """The same of those that read channels far apart where they are: the others' addresses would spill registers."""
    return _shortest(replace(problem, aligned=False), gathers=True)


def _shortest(problem: PatchProblem, gathers: bool) -> PatchConfig:
    small = (
        config
        for config in _candidates(problem, gathers)
        if 4 * config.workspace(problem) <= WORKSPACE_SHARE * problem.patch_bytes
    )
    return min(small, key=lambda config: _duration(config, problem))


def _candidates(problem: PatchProblem, gathers: bool) -> Iterator[PatchConfig]:
    """Tiles that do not spill, no larger than the channels are; all splits with parts of 512 rows or more."""
    fp32, hip = problem.dtype == torch.float32, problem.limits.platform == "hip"
    algorithms: tuple[Algorithm, ...] = ("implicit",)
    columns = problem.per_group
    largest = 128 if problem.aligned else 64
    if hip:  # short of scalar registers, in which masks and addresses are
        largest = 64 if problem.aligned else 16
    if gathers:
        algorithms, columns, largest = ("gather",), problem.n, 32 if fp32 or hip else 64
    elif problem.geometry.shares_displacements and problem.geometry.kernel_positions > 1:
        algorithms = ("implicit", "displacement")
    for algorithm, block_n in product(algorithms, (16, 32, 64, 128)):
        if block_n > largest or block_n > max(16, triton.next_power_of_2(columns)):
            continue
        narrow = algorithm == "gather" or not problem.aligned
        block_k = 16 if fp32 or block_n == 16 or (hip and algorithm == "gather") else 32 if narrow else 64
        num_warps = {16: 1, 32: 4, 64: 4 if problem.aligned and algorithm == "displacement" else 8, 128: 8}[block_n]
        if hip and algorithm == "gather":
            num_warps = dict(GATHERED)[block_n]
        num_stages = 2 if hip or algorithm == "gather" or block_n == 32 or (fp32 and block_n == 128) else 3
        # on Blackwell, a kernel that multiplies a large tile of fp32 and stores it to many blocks spills
        least = 2 if fp32 and block_n == 128 and algorithm == "displacement" and is_blackwell(problem.limits) else 1
        for split_k in SPLITS:
            if split_k >= least and (split_k == 1 or 512 * split_k <= problem.rows):
                yield PatchConfig(algorithm, block_n, block_k, split_k, num_warps, num_stages)


def samples_of_part(problem: PatchProblem) -> int:
    """Samples of an input that are copied at a time: COPY_SHARE of the bytes that patches would take, at most.

    0 if one is too much already (few samples, a kernel of one pixel), or if the input is small: it is read in place.
    """
    geometry, samples = problem.geometry, problem.samples
    pixels = prod(geometry.sizes)
    if samples * pixels * problem.groups * problem.per_group * problem.dtype.itemsize <= SMALL_INPUT:
        return 0
    return int(COPY_SHARE * samples * geometry.positions * geometry.kernel_positions / pixels)


def beside_a_copy(config: PatchConfig, problem: PatchProblem) -> PatchConfig:
    """A configuration with fewer parts of K, so that its workspace takes no more than COPY_SHARE."""
    splits = [s for s in SPLITS if s <= config.SPLIT_K]
    fewer = (replace(config, SPLIT_K=split) for split in reversed(splits))
    return next((c for c in fewer if 4 * c.workspace(problem) <= COPY_SHARE * problem.patch_bytes), config)


RATES = {16: 0.1, 32: 0.25, 64: 0.6, 128: 1.0}  # of products in tiles of a size, relative to the largest; analytic


def _duration(config: PatchConfig, problem: PatchProblem) -> float:
    """Waves of programs, weighted by their length in pixels times tile: products, boundary, second kernel.

    A partial tile is taken for 2 % of a program, the second kernel for 10 %, as for `accumulate_factor_`.
    """
    geometry, places = problem.geometry, problem.limits.multiprocessors
    split = config.SPLIT_K
    waves = triton.cdiv(config.programs(problem) * split, places)
    total = float(waves * problem.rows) / split * (1 + 0.02 * split + 0.1 * (split > 1))
    if config.algorithm == "displacement":
        share = sum(gap / out for gap, out in zip(geometry.gaps, geometry.outputs, strict=True))
        pairs = geometry.kernel_positions * (geometry.kernel_positions + 1) // 2
        programs = problem.groups * pairs * triton.cdiv(problem.per_group, config.BLOCK_N) ** 2
        total += share / 2 * problem.rows * max(1.0, programs / places)
    return total * config.BLOCK_N**2 / RATES[config.BLOCK_N]
