# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""C <- beta C + alpha X^T X for a symmetric C, with X = [rows, 1] if `ones`: how a Kronecker factor gathers statistics.

Shapes: rows (K, n) or (B, K, n), of fp32, fp16 or bf16 and any strides; factor of fp32 with n' = n + 1 if `ones` else
n: dense (n', n') or (B, n', n'), symmetric, both triangles written; or packed (n' (n' + 1) / 2,) or
(B, n' (n' + 1) / 2), in the format of packed.py. The reference takes fp64, too.
Source: A and G of arXiv 1811.12019 section 3; a bias is one more input that is always 1.

The Triton path computes the lower triangle in square tiles and stores each tile twice (once, if packed). One program
owns the pairs (i, j), (j, i) of its tile, so the update is in place without a race, and a C that is bitwise symmetric
stays so. Row and column of the ones are column sums of X, made by programs of their own. If the tiles are too few to
fill the device, K is split: each program writes a partial tile to an fp32 workspace and a second kernel adds them in a
fixed order, so that results do not vary from run to run. `accumulate_factors_` (factor_group.py) takes a whole list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op
from triton.runtime.interpreter import InterpretedFunction

from triton_curv_kernels.backend import UnsupportedInputError, on_own_device, use_reference, wrap_triton
from triton_curv_kernels.choice import choose_once, tables_key
from triton_curv_kernels.factor_config import (
    CONFIGS,
    NUMERICS,
    FactorConfig,
    FactorProblem,
    InputPrecision,
    default_config,
    has_wide_rows,
    prune,
)
from triton_curv_kernels.factor_reference import accumulate_factor_reference
from triton_curv_kernels.factor_tiles import multiply_tile, store_border, store_tile, sum_columns
from triton_curv_kernels.packed import packed_length, tile_of

__all__ = [
    # the op, its reference and its launcher
    "accumulate_factor_",
    "accumulate_factor_reference",
    "launch_accumulate_factor_",
    "supports",
    # its configurations
    "CONFIGS",
    "NUMERICS",
    "FactorConfig",
    "FactorProblem",
    "default_config",
    "prune",
]

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _count_programs(n, ONES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of one matrix: rows of tiles, tiles in the lower triangle, programs (one a tile, then one a border block)."""
    tiles = tl.cdiv(n, BLOCK_N)
    triangle = tiles * (tiles + 1) // 2
    return tiles, triangle, triangle + (tl.maximum(tiles, 1) if ONES else 0)


@triton.jit
def _slot_of(split):
    """The program's place in the workspace, in tiles."""
    return tl.num_programs(0).to(tl.int64) * split + tl.program_id(0)


@triton.jit(do_not_specialize=["k", "steps_per_split"])
def _accumulate_kernel(
    # tensors; the workspace, used if SPLIT, has room for a tile for each program
    rows,
    factor,
    workspace,
    # sizes and scales
    k,
    n,
    alpha,
    beta,
    steps_per_split,
    # strides
    stride_rb,
    stride_rk,
    stride_rn,
    stride_fb,
    stride_fi,
    stride_fj,
    # configuration; ALIGN: rows are contiguous, multiples of so many elements long and apart, or 1
    ONES: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    # map program to matrix, tile or block of columns, and part of K
    tiles, triangle, programs = _count_programs(n, ONES, BLOCK_N)
    batch = tl.program_id(0) // programs
    p = tl.program_id(0) % programs
    split = tl.program_id(1)
    first = split.to(tl.int64) * steps_per_split * BLOCK_K
    count = tl.minimum(k - first, tl.cast(steps_per_split, tl.int64) * BLOCK_K)

    size = n + (1 if ONES else 0)
    rows += batch.to(tl.int64) * stride_rb + first * stride_rk
    factor += batch.to(tl.int64) * stride_fb
    in_block = tl.arange(0, BLOCK_N)
    if ALIGN > 1:
        n = n // ALIGN * ALIGN  # says it to the compiler, which ignores tl.multiple_of on arguments
        stride_rk = stride_rk // ALIGN * ALIGN

    if p < triangle:
        row, column = tile_of(p, tiles)
        i, j = row * BLOCK_N, column * BLOCK_N
        acc = multiply_tile(rows, i, j, count, n, stride_rk, stride_rn, BLOCK_N, BLOCK_K, INPUT_PRECISION)
        if not SPLIT:
            store_tile(factor, acc, i, j, n, size, alpha, beta, stride_fi, stride_fj, BLOCK_N, PACKED)
        else:
            part = workspace + _slot_of(split) * (BLOCK_N * BLOCK_N)
            tl.store(part + in_block[:, None] * BLOCK_N + in_block[None, :], acc)
    else:
        j = (p - triangle) * BLOCK_N
        sums = sum_columns(rows, j, count, n, stride_rk, stride_rn, BLOCK_N, BLOCK_K)
        if not SPLIT:
            store_border(factor, sums, j, n, k, alpha, beta, stride_fi, stride_fj, BLOCK_N, PACKED)
        else:
            tl.store(workspace + _slot_of(split) * (BLOCK_N * BLOCK_N) + in_block, sums)


@triton.jit(do_not_specialize=["k", "splits"])
def _finish_kernel(
    # tensors
    factor,
    workspace,
    # sizes and scales
    k,
    n,
    alpha,
    beta,
    splits,
    # strides
    stride_fb,
    stride_fi,
    stride_fj,
    # configuration
    ONES: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the partial tiles (or column sums) of all parts of K, in their order, and store."""
    tiles, triangle, programs = _count_programs(n, ONES, BLOCK_N)
    p = tl.program_id(0) % programs
    factor += (tl.program_id(0) // programs).to(tl.int64) * stride_fb
    in_block = tl.arange(0, BLOCK_N)
    size = n + (1 if ONES else 0)

    if p < triangle:
        row, column = tile_of(p, tiles)
        acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        for split in range(splits):
            part = workspace + _slot_of(split) * (BLOCK_N * BLOCK_N)
            acc += tl.load(part + in_block[:, None] * BLOCK_N + in_block[None, :])
        store_tile(
            factor, acc, row * BLOCK_N, column * BLOCK_N, n, size, alpha, beta, stride_fi, stride_fj, BLOCK_N, PACKED
        )
    else:
        sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for split in range(splits):
            sums += tl.load(workspace + _slot_of(split) * (BLOCK_N * BLOCK_N) + in_block)
        store_border(factor, sums, (p - triangle) * BLOCK_N, n, k, alpha, beta, stride_fi, stride_fj, BLOCK_N, PACKED)


def supports(factor: Tensor, rows: Tensor) -> bool:
    """Whether the Triton path takes these dtypes: an fp32 factor of fp32, fp16 or bf16 rows.

    For others, fp64 say, the op takes the reference.
    """
    return factor.dtype == torch.float32 and rows.dtype in INPUT_DTYPES


@on_own_device
def launch_accumulate_factor_(
    factor: Tensor,
    rows: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    ones: bool = False,
    config: FactorConfig | None = None,
) -> None:
    """`accumulate_factor_` by Triton, whatever the device: one launch, two if `config` splits K."""
    check_shapes(factor, rows, ones)
    if not supports(factor, rows):
        raise UnsupportedInputError(
            f"expected an fp32 factor and fp32, fp16 or bf16 rows, got {factor.dtype} and {rows.dtype}"
        )
    if factor.numel() == 0:
        return
    config = config or choose_once(
        "accumulate_factor_",
        (rows.shape, rows.stride(), rows.dtype, rows.device, ones),
        lambda: FactorProblem.of(rows, ones),
        default_config,
    )
    k, n, batch, block = *rows.shape[-2:], rows.shape[0] if rows.dim() == 3 else 1, config.BLOCK_N
    tiles = triton.cdiv(n, block)
    programs = batch * (tiles * (tiles + 1) // 2 + (max(tiles, 1) if ones else 0))
    steps = triton.cdiv(k, config.BLOCK_K)
    steps_per_split = max(1, triton.cdiv(steps, config.SPLIT_K))
    splits = max(1, triton.cdiv(steps, steps_per_split))
    workspace = factor
    if splits > 1:
        workspace = torch.empty(splits * programs * block**2, dtype=torch.float32, device=factor.device)
    packed = factor.dim() < rows.dim()
    dense_strides = (0, 0) if packed else factor.stride()[-2:]
    factor_strides = (factor.stride(0) if rows.dim() == 3 else 0, *dense_strides)
    rows_strides = rows.stride() if rows.dim() == 3 else (0, *rows.stride())
    sizes = (k, n, alpha, beta)
    tiling = {"ONES": ones, "PACKED": packed, "BLOCK_N": block, "num_warps": config.num_warps}
    wrap_triton(_accumulate_kernel)[(programs, splits)](
        *(rows, factor, workspace, *sizes, steps_per_split, *rows_strides, *factor_strides),
        **tiling,
        ALIGN=16 // rows.dtype.itemsize if has_wide_rows(rows) else 1,
        BLOCK_K=config.BLOCK_K,
        SPLIT=splits > 1,
        INPUT_PRECISION=compiled_precision(config.input_precision),
        num_stages=config.num_stages,
    )
    if splits > 1:
        wrap_triton(_finish_kernel)[(programs,)](factor, workspace, *sizes, splits, *factor_strides, **tiling)


def compiled_precision(input_precision: InputPrecision) -> InputPrecision:
    """What goes to `tl.dot`: the interpreter, which makes all products in fp32, does not know "bf16x6"."""
    return "ieee" if isinstance(_accumulate_kernel, InterpretedFunction) else input_precision


def check_shapes(factor: Tensor, rows: Tensor, ones: bool) -> None:
    """Raise UnsupportedInputError unless `factor`, dense or packed, is one of `rows`."""
    batch, n = rows.shape[:-2], rows.shape[-1] + int(ones)  # torch 2.11 cannot add a bool to a symbolic size
    dense, packed = (*batch, n, n), (*batch, packed_length(n))
    if rows.dim() not in (2, 3) or factor.shape not in (dense, packed):
        raise UnsupportedInputError(
            "expected rows (K, n) or (B, K, n) and a factor dense (n', n') or (B, n', n') or packed "
            f"(n' (n' + 1) / 2,) or (B, n' (n' + 1) / 2) with n' = n + {int(ones)}, got rows {tuple(rows.shape)} and "
            f"factor {tuple(factor.shape)}"
        )
    if factor.shape == packed and factor.stride(-1) != 1 and factor.shape[-1] > 1:
        raise UnsupportedInputError(f"expected a packed factor without gaps, got strides {factor.stride()}")


@triton_op("triton_curv::accumulate_factor_", mutates_args={"factor"})
def _accumulate_factor_op(
    factor: Tensor,
    rows: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    ones: bool = False,
    config: list[int] | None = None,
    tables: str = "",
) -> None:
    if use_reference(factor) or not supports(factor, rows):
        check_shapes(factor, rows, ones)
        accumulate_factor_reference(factor, rows, alpha, beta, ones)
    else:
        parsed = None if config is None else FactorConfig.from_ints(config)
        launch_accumulate_factor_(factor, rows, alpha, beta, ones, parsed)


def accumulate_factor_(
    factor: Tensor,
    rows: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    ones: bool = False,
    config: FactorConfig | None = None,
) -> None:
    """`factor.mul_(beta).add_(X.mT @ X, alpha=alpha)` with `X = torch.cat([rows, 1], -1)` if `ones`, else `X = rows`.

    Args:
        factor: symmetric, fp32 (fp64: by the reference), n' = n + 1 if `ones` else n. Its shape says whether it is
            dense, (n', n') or (B, n', n'), or packed, (n' (n' + 1) / 2,) or (B, n' (n' + 1) / 2): see packed.py.
        rows: (K, n) or (B, K, n), fp32, fp16 or bf16 (fp64: by the reference), any strides; K may be 0.
        alpha: scale of the product.
        beta: scale of what is there; 0 ignores it, NaN included.
        ones: take one more column into account, of ones: the input that belongs to a bias.
        config: tiling of the Triton kernel; None means the tuner's choice, `default_config` without one.

    No gradient flows through it. Source: factors A and G of arXiv 1811.12019 section 3.

    Raises:
        UnsupportedInputError: shapes that do not fit.

    """
    rows = rows.detach()
    if not torch.compiler.is_compiling() and use_reference(factor):
        check_shapes(factor, rows, ones)
        accumulate_factor_reference(factor, rows, alpha, beta, ones)
    else:
        ints = None if config is None else config.to_ints()
        torch.ops.triton_curv.accumulate_factor_(factor, rows, alpha, beta, ones, ints, tables_key())
