# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""C <- beta C + alpha X^T X for a symmetric C, with X = [rows, 1] if `ones`: how a Kronecker factor gathers statistics.

Shapes: rows (K, n) or (B, K, n), of fp32, fp16 or bf16 and any strides; factor (n', n') or (B, n', n') of fp32 with
n' = n + 1 if `ones` else n, dense and symmetric, both triangles written. The reference takes fp64, too.
Source: A and G of arXiv 1811.12019 section 3; a bias is one more input that is always 1.

The Triton path computes the lower triangle in square tiles and stores each tile twice. One program owns the pairs
(i, j), (j, i) of its tile, so the update is in place without a race, and a C that is bitwise symmetric stays so. Row
and column of the ones are column sums of X, made by programs of their own. If the tiles are too few to fill the
device, K is split: each program writes a partial tile to an fp32 workspace and a second kernel adds them in a fixed
order, so that results do not vary from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional

from triton_curv_kernels.backend import UnsupportedInputError, use_reference, wrap_triton
from triton_curv_kernels.choice import choose, tables_key
from triton_curv_kernels.factor_config import CONFIGS, FactorConfig, FactorProblem, default_config, prune

__all__ = [
    # the op, its reference and its launcher
    "accumulate_factor_",
    "accumulate_factor_reference",
    "launch_accumulate_factor_",
    "supports",
    # its configurations
    "CONFIGS",
    "FactorConfig",
    "FactorProblem",
    "default_config",
    "prune",
]

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def accumulate_factor_reference(
    factor: Tensor, rows: Tensor, alpha: float = 1.0, beta: float = 1.0, ones: bool = False
) -> None:
    """`factor.mul_(beta).add_(X.mT @ X, alpha=alpha)` with `X = torch.cat([rows, 1], -1)` if `ones`, else `X = rows`.

    What it does beside one product is measured on one CPU thread: a copy of X with its ones costs less than the calls
    that a border takes if it is small, and panels of 64 columns, mirrored, take 0.66 of a whole product's time at
    K, n = 2048, 288 and 0.77 at 2048, 144.
    """
    rows = rows.to(factor.dtype)
    if ones and rows.numel() <= 1 << 16:
        rows, ones = functional.pad(rows, (0, 1), value=1.0), False
    k, n = rows.shape[-2:]
    core = factor[..., :n, :n] if ones else factor
    if factor.dim() == 3:
        core.baddbmm_(rows.mT, rows, beta=beta, alpha=alpha)
    elif n < 128 or k < 4 * n:
        core.addmm_(rows.mT, rows, beta=beta, alpha=alpha)
    else:
        for i in range(0, n, 64):
            panel = core[i:, i : i + 64]
            panel.addmm_(rows[:, i:].mT, rows[:, i : i + 64], beta=beta, alpha=alpha)
            core[i : i + 64, i + 64 :].copy_(panel[64:].mT)
    if not ones:
        return
    border = factor[..., n, :]
    if beta == 0.0:
        border.zero_()  # 0 * NaN is not 0
    elif beta != 1.0:
        border.mul_(beta)
    border[..., :n].add_(rows.sum(-2), alpha=alpha)
    border[..., n].add_(alpha * k)
    factor[..., :n, n].copy_(border[..., :n])


@triton.jit
def _count_programs(n, ONES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of one matrix: rows of tiles, tiles in the lower triangle, programs (one a tile, then one a border block)."""
    tiles = tl.cdiv(n, BLOCK_N)
    triangle = tiles * (tiles + 1) // 2
    return tiles, triangle, triangle + (tl.maximum(tiles, 1) if ONES else 0)


@triton.jit
def _tile_of(p, tiles):
    """Tile (row, column), row >= column, number p of a triangle of `tiles` rows: exact, in integers only.

    Row `tiles - 1 - i` (long) and row `i` (short) together have tiles + 1 tiles, whatever i: they are numbered as one.
    """
    pair = p // (tiles + 1)
    j = p % (tiles + 1)
    is_long = j < tiles - pair
    row = tl.where(is_long, tiles - 1 - pair, pair)
    column = tl.where(is_long, j, j - (tiles - pair))
    return row, column


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_columns(factor, value, i, j, mirror, n, beta, stride_i, stride_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """C[i:, j:] <- beta C[i:, j:] + value, and the same transposed to C[j:, i:] if `mirror`."""
    offs_i = (i + tl.arange(0, ROWS)).to(tl.int64)
    offs_j = (j + tl.arange(0, COLUMNS)).to(tl.int64)
    ptrs = factor + offs_i[:, None] * stride_i + offs_j[None, :] * stride_j
    mask = (offs_i[:, None] < n) & (offs_j[None, :] < n)
    if beta != 0.0:
        value += beta * tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, value, mask=mask)
    if mirror:
        mirrored_ptrs = factor + offs_j[:, None] * stride_i + offs_i[None, :] * stride_j
        tl.store(mirrored_ptrs, tl.trans(value), mask=(offs_j[:, None] < n) & (offs_i[None, :] < n))


@triton.jit
def _store_tile(factor, acc, row, column, n, alpha, beta, stride_i, stride_j, BLOCK_N: tl.constexpr):
    """C[tile] <- beta C[tile] + alpha acc and the same values mirrored; acc of a diagonal tile is made symmetric.

    Large tiles go in parts of 32 columns: the addresses of a whole tile at a time would spill registers.
    """
    in_block = tl.arange(0, BLOCK_N)
    if row == column:
        acc = tl.where(in_block[None, :] <= in_block[:, None], acc, tl.trans(acc))
    value = alpha * acc
    i, j, m = row * BLOCK_N, column * BLOCK_N, row != column
    if BLOCK_N <= 32:
        _store_columns(factor, value, i, j, m, n, beta, stride_i, stride_j, BLOCK_N, BLOCK_N)
    else:
        left, right = _halves(value, BLOCK_N, BLOCK_N)
        if BLOCK_N == 64:
            _store_columns(factor, left, i, j, m, n, beta, stride_i, stride_j, BLOCK_N, 32)
            _store_columns(factor, right, i, j + 32, m, n, beta, stride_i, stride_j, BLOCK_N, 32)
        else:
            tl.static_assert(BLOCK_N == 128)
            first, second = _halves(left, BLOCK_N, 64)
            third, fourth = _halves(right, BLOCK_N, 64)
            _store_columns(factor, first, i, j, m, n, beta, stride_i, stride_j, BLOCK_N, 32)
            _store_columns(factor, second, i, j + 32, m, n, beta, stride_i, stride_j, BLOCK_N, 32)
            _store_columns(factor, third, i, j + 64, m, n, beta, stride_i, stride_j, BLOCK_N, 32)
            _store_columns(factor, fourth, i, j + 96, m, n, beta, stride_i, stride_j, BLOCK_N, 32)


@triton.jit
def _store_border(factor, sums, block, n, k, alpha, beta, stride_i, stride_j, BLOCK_N: tl.constexpr):
    """Row and column n of C from column sums of the rows; block 0 also writes the corner, sum of ones * ones = k."""
    offs = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask = offs < n
    end = tl.cast(n, tl.int64)
    row_ptrs = factor + end * stride_i + offs * stride_j
    value = alpha * sums
    if beta != 0.0:
        value += beta * tl.load(row_ptrs, mask=mask, other=0.0)
    tl.store(row_ptrs, value, mask=mask)
    tl.store(factor + offs * stride_i + end * stride_j, value, mask=mask)
    if block == 0:
        corner_ptr = factor + end * stride_i + end * stride_j
        corner = alpha * k
        if beta != 0.0:
            corner += beta * tl.load(corner_ptr)
        tl.store(corner_ptr, corner)


@triton.jit
def _slot_of(split):
    """The program's place in the workspace, in tiles."""
    return tl.num_programs(0).to(tl.int64) * split + tl.program_id(0)


@triton.jit
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
    # configuration
    ONES: tl.constexpr,
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
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(k, BLOCK_K))

    rows += batch.to(tl.int64) * stride_rb
    factor += batch.to(tl.int64) * stride_fb
    offs_k = tl.arange(0, BLOCK_K)
    in_block = tl.arange(0, BLOCK_N)
    advance = tl.cast(stride_rk, tl.int64) * BLOCK_K
    rows += first * advance

    if p < triangle:
        row, column = _tile_of(p, tiles)
        offs_i = row * BLOCK_N + in_block
        offs_j = column * BLOCK_N + in_block
        i_ptrs = rows + offs_k.to(tl.int64)[:, None] * stride_rk + offs_i.to(tl.int64)[None, :] * stride_rn
        j_ptrs = rows + offs_k.to(tl.int64)[:, None] * stride_rk + offs_j.to(tl.int64)[None, :] * stride_rn
        acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        for step in range(first, last):
            in_k = offs_k[:, None] < k - step * BLOCK_K
            x_i = tl.load(i_ptrs, mask=in_k & (offs_i[None, :] < n), other=0.0)  # (BLOCK_K, BLOCK_N)
            x_j = tl.load(j_ptrs, mask=in_k & (offs_j[None, :] < n), other=0.0)
            acc = tl.dot(tl.trans(x_i), x_j, acc, input_precision=INPUT_PRECISION)
            i_ptrs += advance
            j_ptrs += advance
        if not SPLIT:
            _store_tile(factor, acc, row, column, n, alpha, beta, stride_fi, stride_fj, BLOCK_N)
        else:
            part = workspace + _slot_of(split) * (BLOCK_N * BLOCK_N)
            tl.store(part + in_block[:, None] * BLOCK_N + in_block[None, :], acc)
    else:
        block = p - triangle
        offs_j = block * BLOCK_N + in_block
        ptrs = rows + offs_k.to(tl.int64)[:, None] * stride_rk + offs_j.to(tl.int64)[None, :] * stride_rn
        column_acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
        for step in range(first, last):
            mask = (offs_k[:, None] < k - step * BLOCK_K) & (offs_j[None, :] < n)
            column_acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
            ptrs += advance
        sums = tl.sum(column_acc, axis=0)
        if not SPLIT:
            _store_border(factor, sums, block, n, k, alpha, beta, stride_fi, stride_fj, BLOCK_N)
        else:
            tl.store(workspace + _slot_of(split) * (BLOCK_N * BLOCK_N) + in_block, sums)


@triton.jit
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
    BLOCK_N: tl.constexpr,
):
    """Add the partial tiles (or column sums) of all parts of K, in their order, and store."""
    tiles, triangle, programs = _count_programs(n, ONES, BLOCK_N)
    p = tl.program_id(0) % programs
    factor += (tl.program_id(0) // programs).to(tl.int64) * stride_fb
    in_block = tl.arange(0, BLOCK_N)

    if p < triangle:
        row, column = _tile_of(p, tiles)
        acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        for split in range(splits):
            part = workspace + _slot_of(split) * (BLOCK_N * BLOCK_N)
            acc += tl.load(part + in_block[:, None] * BLOCK_N + in_block[None, :])
        _store_tile(factor, acc, row, column, n, alpha, beta, stride_fi, stride_fj, BLOCK_N)
    else:
        sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for split in range(splits):
            sums += tl.load(workspace + _slot_of(split) * (BLOCK_N * BLOCK_N) + in_block)
        _store_border(factor, sums, p - triangle, n, k, alpha, beta, stride_fi, stride_fj, BLOCK_N)


def supports(factor: Tensor, rows: Tensor) -> bool:
    """Whether the Triton path takes these dtypes: an fp32 factor of fp32, fp16 or bf16 rows.

    For others, fp64 say, the op takes the reference.
    """
    return factor.dtype == torch.float32 and rows.dtype in INPUT_DTYPES


def launch_accumulate_factor_(
    factor: Tensor,
    rows: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    ones: bool = False,
    config: FactorConfig | None = None,
) -> None:
    """`accumulate_factor_` by Triton, whatever the device: one launch, two if `config` splits K."""
    _check_shapes(factor, rows, ones)
    if not supports(factor, rows):
        raise UnsupportedInputError(
            f"expected an fp32 factor and fp32, fp16 or bf16 rows, got {factor.dtype} and {rows.dtype}"
        )
    if factor.numel() == 0:
        return
    problem = FactorProblem.of(rows, ones)
    config = config or choose("accumulate_factor_", problem, default_config)
    k, n, batch, block = problem.k, problem.n, problem.batch, config.BLOCK_N
    tiles = triton.cdiv(n, block)
    programs = batch * (tiles * (tiles + 1) // 2 + (max(tiles, 1) if ones else 0))
    steps = triton.cdiv(k, config.BLOCK_K)
    steps_per_split = max(1, triton.cdiv(steps, config.SPLIT_K))
    splits = max(1, triton.cdiv(steps, steps_per_split))
    workspace = factor
    if splits > 1:
        workspace = torch.empty(splits * programs * block**2, dtype=torch.float32, device=factor.device)
    factor_strides = factor.stride() if factor.dim() == 3 else (0, *factor.stride())
    rows_strides = rows.stride() if rows.dim() == 3 else (0, *rows.stride())
    sizes = (k, n, alpha, beta)
    tiling = {"ONES": ones, "BLOCK_N": block, "num_warps": config.num_warps}
    wrap_triton(_accumulate_kernel)[(programs, splits)](
        *(rows, factor, workspace, *sizes, steps_per_split, *rows_strides, *factor_strides),
        **tiling,
        BLOCK_K=config.BLOCK_K,
        SPLIT=splits > 1,
        INPUT_PRECISION=config.input_precision,
        num_stages=config.num_stages,
    )
    if splits > 1:
        wrap_triton(_finish_kernel)[(programs,)](factor, workspace, *sizes, splits, *factor_strides, **tiling)


def _check_shapes(factor: Tensor, rows: Tensor, ones: bool) -> None:
    n = rows.shape[-1] + ones
    if rows.dim() not in (2, 3) or factor.shape != (*rows.shape[:-2], n, n):
        raise UnsupportedInputError(
            f"expected rows (K, n) or (B, K, n) and a factor (n', n') or (B, n', n') with n' = n + {int(ones)}, "
            f"got rows {tuple(rows.shape)} and factor {tuple(factor.shape)}"
        )


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
        _check_shapes(factor, rows, ones)
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
        factor: (n', n') or (B, n', n'), n' = n + 1 if `ones` else n; dense, symmetric, fp32 (fp64: by the reference).
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
        _check_shapes(factor, rows, ones)
        accumulate_factor_reference(factor, rows, alpha, beta, ones)
    else:
        ints = None if config is None else config.to_ints()
        torch.ops.triton_curv.accumulate_factor_(factor, rows, alpha, beta, ones, ints, tables_key())
