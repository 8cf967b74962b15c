"""The work of a grouped factor accumulation, cut into programs: tables of int64 that its kernels read.

`plan` is a pure function of sizes, strides and configuration. Memory addresses are in a table of their own, so that
activations that lie elsewhere at each step cost a copy of a few kilobytes and no new plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triton_curv_kernels.device_cache import Table
from triton_curv_kernels.factor_config import has_wide_rows, prefers_large_tiles
from triton_curv_kernels.factor_group_config import GroupConfig, parts_of

BORDER_N = 64  # columns that a program of the border sums
WIDEST_STRIP = 16  # columns that a finishing program writes: 32 spill registers
COLUMN_GROUP = 8  # tiles of so many columns follow one another, row by row: their rows of X stay in the L2 cache
STORE = -1  # in place of a workspace offset: the result goes to the factor at once, or nowhere


class Kind(IntEnum):
    """What a program does; bits, so that a kernel is compiled for the kinds that occur."""

    LARGE = 1
    """A tile of BLOCK_N."""
    SMALL = 2
    """A tile of SMALL_N."""
    STRIDED = 4
    """A tile of SMALL_N, of rows with any strides."""
    BORDER = 8
    """Column sums."""
    STRIDED_BORDER = 16
    """Column sums, of rows with any strides."""
    STATISTICS = 32
    """Trace and count of what is not finite, of the whole factor."""


class MatrixShape(NamedTuple):
    """One C += X^T X: `entry` is its place in the caller's lists, `place` the one in a list of all matrices."""

    entry: int
    k: int
    n: int
    ones: bool
    packed: bool
    wide: bool
    stride_rk: int
    stride_rn: int
    stride_fi: int
    stride_fj: int
    place: int

    @property
    def size(self) -> int:
        """Rows of the factor."""
        return self.n + self.ones


SHAPE_COLUMNS = 10  # n, size, k, entry, packed, stride_rk, stride_rn, stride_fi, stride_fj, place
ITEM_COLUMNS = 9  # kind, matrix, row, column, first, count, slot, diagonal, old
FINISH_COLUMNS = 8  # kind, matrix, row, column, strip, slot, parts, stride


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables of a call: matrices (M, SHAPE_COLUMNS), programs of both kernels, and what the kernels must be able to.

    Programs come longest first; those that read the same rows follow one another.
    """

    shapes: Table
    items: Table
    finish: Table
    workspace: int
    kinds: int
    finish_kinds: int
    splits: bool


class AddressedMatrix(NamedTuple):
    """A matrix and where its rows and its factor lie."""

    shape: MatrixShape
    rows: int
    factor: int


def matrices_of(entry: int, place: int, factor: Tensor, rows: Tensor, ones: bool) -> list[AddressedMatrix]:
    """The matrices of one pair of tensors, several for a batch."""
    packed = factor.dim() < rows.dim()
    fi, fj = (0, 0) if packed else factor.stride()[-2:]
    k, n = rows.shape[-2:]
    batch, rows_step, factor_step = 1, 0, 0
    if rows.dim() == 3:
        batch = rows.shape[0]
        rows_step, factor_step = rows.stride(0) * rows.dtype.itemsize, factor.stride(0) * factor.dtype.itemsize
    rows_at, factor_at = rows.data_ptr(), factor.data_ptr()
    wide = has_wide_rows(rows) and rows_at % 16 == 0
    rk, rn = rows.stride()[-2:]
    shape = MatrixShape(entry, k, n, ones, packed, wide, rk, rn, fi, fj, place)
    return [
        AddressedMatrix(shape._replace(place=place + b), rows_at + b * rows_step, factor_at + b * factor_step)
        for b in range(batch)
    ]


def tile_kind(matrix: MatrixShape, fp32: bool, config: GroupConfig) -> Kind:
    """Large tiles where they take less time: never for rows with any strides, whose addresses need registers."""
    if not matrix.wide:
        return Kind.STRIDED
    large = prefers_large_tiles(matrix.n, fp32, config.BLOCK_N, config.SMALL_N)
    return Kind.LARGE if large else Kind.SMALL


@lru_cache(maxsize=64)
def plan(matrices: tuple[MatrixShape, ...], dtype: torch.dtype, config: GroupConfig, statistics: bool) -> Plan:
    """Cut the matrices into tiles and parts of K, and give each part that does not write C a place in the workspace.

    None writes C if one K is cut: stores would take the multiplying kernel twice the registers.
    """
    items: list[tuple[int, Table]] = []  # (length of a program, programs)
    finish: list[tuple[int, Table]] = []
    workspace = 0

    def reserve(floats: int) -> int:
        nonlocal workspace
        start = workspace
        workspace += -(-floats // 64) * 64
        return start

    split = any(parts_of(matrix.k, config)[0] > 1 for matrix in matrices)
    for m, matrix in enumerate(matrices):
        kind = tile_kind(matrix, dtype == torch.float32, config)
        block = config.BLOCK_N if kind == Kind.LARGE else config.SMALL_N
        parts, rows = parts_of(matrix.k, config)
        first = np.arange(parts, dtype=np.int64) * rows
        count = np.minimum(matrix.k - first, rows)
        row, column = _triangle(-(-matrix.n // block))
        borders = np.arange(max(1, -(-matrix.n // BORDER_N)) if matrix.ones else 0, dtype=np.int64)
        padded = -(-max(matrix.size, 1) // 128) * 128 + 128  # a tile may write past the last column

        diagonal = reserve((parts + 1) * padded) if statistics and matrix.size else STORE
        old = diagonal + parts * padded
        tile_slot = reserve(len(row) * parts * block**2) if split else STORE
        border_slot = reserve(parts * padded) if split and matrix.ones else STORE

        table = np.full((parts, len(row) + len(borders), ITEM_COLUMNS), STORE, dtype=np.int64)
        part = np.arange(parts, dtype=np.int64)[:, None]
        tiles, border = table[:, : len(row)], table[:, len(row) :]
        table[..., 1] = m
        table[..., 4] = first[:, None]
        table[..., 5] = count[:, None]
        tiles[..., 0] = kind
        tiles[..., 2] = row
        tiles[..., 3] = column
        border[..., 0] = Kind.BORDER if matrix.wide else Kind.STRIDED_BORDER
        border[..., 3] = borders
        if split:
            tiles[..., 6] = tile_slot + (np.arange(len(row)) * parts + part) * block**2
            border[..., 6] = border_slot + part * padded
        if diagonal != STORE:
            tiles[..., 7] = diagonal + part * padded
            table[0, :, 8] = old
        items.append((rows * block**2, table.reshape(-1, ITEM_COLUMNS)))

        if split:
            strip = min(WIDEST_STRIP, block)
            strips = np.arange(block // strip, dtype=np.int64)
            strip_items = np.empty((len(row), len(strips), FINISH_COLUMNS), dtype=np.int64)
            strip_items[..., 0] = Kind.LARGE if kind == Kind.LARGE else Kind.SMALL
            strip_items[..., 1] = m
            strip_items[..., 2], strip_items[..., 3], strip_items[..., 4] = row[:, None], column[:, None], strips
            strip_items[..., 5] = tile_slot + np.arange(len(row), dtype=np.int64)[:, None] * parts * block**2
            strip_items[..., 6], strip_items[..., 7] = parts, block**2
            finish.append((parts, strip_items.reshape(-1, FINISH_COLUMNS)))
            edge: Table = np.zeros((len(borders), FINISH_COLUMNS), dtype=np.int64)
            edge[:, 0], edge[:, 1], edge[:, 3] = Kind.BORDER, m, borders
            edge[:, 5:] = border_slot, parts, padded
            finish.append((parts, edge))
        if statistics:
            whole = [Kind.STATISTICS, m, 0, 0, 0, diagonal, parts, padded]
            finish.append((parts * max(1, matrix.n // 64), np.array([whole], dtype=np.int64)))

    shapes = [
        (x.n, x.size, x.k, x.entry, x.packed, x.stride_rk, x.stride_rn, x.stride_fi, x.stride_fj, x.place)
        for x in matrices
    ]
    work, ends = _longest_first(items, ITEM_COLUMNS), _longest_first(finish, FINISH_COLUMNS)
    return Plan(
        shapes=np.array(shapes, dtype=np.int64).reshape(-1, SHAPE_COLUMNS),
        items=work,
        finish=ends,
        workspace=workspace,
        kinds=int(np.bitwise_or.reduce(work[:, 0], initial=0)),
        finish_kinds=int(np.bitwise_or.reduce(ends[:, 0], initial=0)),
        splits=split,
    )


@lru_cache(maxsize=256)
def _triangle(tiles: int) -> tuple[Table, Table]:
    """Rows and columns of the tiles on and below the diagonal, COLUMN_GROUP columns at a time."""
    row, column = (x.astype(np.int64) for x in np.tril_indices(tiles))
    order = np.lexsort((column, row, column // COLUMN_GROUP))
    return row[order], column[order]


def _longest_first(tables: Sequence[tuple[int, Table]], columns: int) -> Table:
    ordered = sorted(tables, key=lambda x: -x[0])
    return np.concatenate([np.empty((0, columns), dtype=np.int64), *(table for _, table in ordered)])
