# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, SIM102
# (Triton's language is untyped; an outer `if` of constants says what is compiled)
"""The two kernels of `accumulate_factors_`: programs are rows of the tables that factor_table.py makes."""

import triton
import triton.language as tl

from triton_curv_kernels.factor_tiles import multiply_tile, store_border, store_columns, store_tile, sum_columns
from triton_curv_kernels.packed import offset_in_packed


@triton.jit
def _load_shape(shapes, m):
    row = shapes + m * 10
    packed = tl.load(row + 4) != 0
    strides = (tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 8))
    n = tl.load(row).to(tl.int32)
    size = tl.load(row + 1).to(tl.int32)
    return n, size, tl.load(row + 2), tl.load(row + 3), packed, strides


@triton.jit
def _run_tile(
    address,
    factor,
    workspace,
    row,
    column,
    first,
    count,
    n,
    size,
    alpha,
    beta,
    packed,
    stride_rk,
    stride_rn,
    stride_fi,
    stride_fj,
    slot,
    diagonal,
    old,
    ROWS_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    PACKED: tl.constexpr,
    SPLITS: tl.constexpr,
    STATISTICS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A tile's product to C, or to the workspace; of a tile on the diagonal, what the statistics need, too.

    The compiler forgets `tl.multiple_of` of an argument, which is why sizes say it by arithmetic.
    """
    rows = address.to(tl.pointer_type(ROWS_DTYPE))
    if ALIGN > 1:
        rows = tl.multiple_of(rows, 16)
        n = n // ALIGN * ALIGN
        stride_rk = stride_rk // ALIGN * ALIGN
    rows += first * stride_rk
    i = row.to(tl.int32) * BLOCK_N
    j = column.to(tl.int32) * BLOCK_N
    in_block = tl.arange(0, BLOCK_N)
    acc = multiply_tile(rows, i, j, count, n, stride_rk, stride_rn, BLOCK_N, BLOCK_K, INPUT_PRECISION)
    if STATISTICS and i == j:
        on_diagonal = tl.sum(tl.where(in_block[:, None] == in_block[None, :], acc, 0.0), axis=1)
        tl.store(workspace + diagonal + i + in_block, on_diagonal)
        if old >= 0:
            offs = (i + in_block).to(tl.int64)
            at = tl.where(packed, offset_in_packed(offs, offs, size.to(tl.int64)), offs * (stride_fi + stride_fj))
            before = tl.zeros((BLOCK_N,), dtype=tl.float32)
            if beta != 0.0:
                before = tl.load(factor + at, mask=offs < n, other=0.0)
            # column n, a border's, is another program's
            tl.store(workspace + old + offs, before, mask=offs < n)
            tl.debug_barrier()  # the same program overwrites it
    if SPLITS:
        part = workspace + slot // 64 * 64
        tl.store(part + in_block[:, None] * BLOCK_N + in_block[None, :], acc)
    elif PACKED == "all":
        store_tile(factor, acc, i, j, n, size, alpha, beta, stride_fi, stride_fj, BLOCK_N, True)
    elif PACKED == "none":
        store_tile(factor, acc, i, j, n, size, alpha, beta, stride_fi, stride_fj, BLOCK_N, False)
    elif packed:
        store_tile(factor, acc, i, j, n, size, alpha, beta, stride_fi, stride_fj, BLOCK_N, True)
    else:
        store_tile(factor, acc, i, j, n, size, alpha, beta, stride_fi, stride_fj, BLOCK_N, False)


@triton.jit
def _store_either_border(factor, sums, j, n, k, alpha, beta, packed, stride_fi, stride_fj, BLOCK_N: tl.constexpr):
    if packed:
        store_border(factor, sums, j, n, k, alpha, beta, stride_fi, stride_fj, BLOCK_N, True)
    else:
        store_border(factor, sums, j, n, k, alpha, beta, stride_fi, stride_fj, BLOCK_N, False)


@triton.jit
def multiply_group_kernel(
    # tables and vectors on the device; the workspace holds parts of K and diagonals
    addresses,
    shapes,
    items,
    alphas,
    betas,
    workspace,
    # configuration
    ROWS_DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    PACKED: tl.constexpr,
    SPLITS: tl.constexpr,
    STATISTICS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SMALL_N: tl.constexpr,
    BORDER_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A tile or a block of column sums of one matrix and one part of its K."""
    item = items + tl.program_id(0).to(tl.int64) * 9
    kind = tl.load(item)
    m = tl.load(item + 1)
    row = tl.load(item + 2)
    column = tl.load(item + 3)
    first = tl.load(item + 4)
    count = tl.load(item + 5).to(tl.int32)
    slot = tl.load(item + 6)
    diagonal = tl.load(item + 7)
    old = tl.load(item + 8)
    n, size, k, entry, packed, strides = _load_shape(shapes, m)
    alpha = tl.load(alphas + entry)
    beta = tl.load(betas + entry)
    address = tl.load(addresses + 2 * m)
    factor = tl.load(addresses + 2 * m + 1).to(tl.pointer_type(tl.float32))
    stride_rk, stride_rn, stride_fi, stride_fj = strides
    if KINDS & 1:
        if kind == 1:
            _run_tile(
                address, factor, workspace, row, column, first, count, n, size, alpha, beta, packed, stride_rk, 1,
                stride_fi, stride_fj, slot, diagonal, old, ROWS_DTYPE, BLOCK_N, BLOCK_K, ALIGN, PACKED, SPLITS,
                STATISTICS, INPUT_PRECISION,
            )  # fmt: skip
    if KINDS & 2:
        if kind == 2:
            _run_tile(
                address, factor, workspace, row, column, first, count, n, size, alpha, beta, packed, stride_rk, 1,
                stride_fi, stride_fj, slot, diagonal, old, ROWS_DTYPE, SMALL_N, BLOCK_K, ALIGN, PACKED, SPLITS,
                STATISTICS, INPUT_PRECISION,
            )  # fmt: skip
    if KINDS & 4:
        if kind == 4:
            _run_tile(
                address, factor, workspace, row, column, first, count, n, size, alpha, beta, packed, stride_rk,
                stride_rn, stride_fi, stride_fj, slot, diagonal, old, ROWS_DTYPE, SMALL_N, BLOCK_K, 1, PACKED, SPLITS,
                STATISTICS, INPUT_PRECISION,
            )  # fmt: skip
    if KINDS & 24:
        if kind >= 8:
            j = column.to(tl.int32) * BORDER_N
            if STATISTICS:
                if old >= 0 and j == 0:
                    end = n.to(tl.int64)
                    end = tl.where(packed, offset_in_packed(end, end, end + 1), end * (stride_fi + stride_fj))
                    before = 0.0
                    if beta != 0.0:
                        before = tl.load(factor + end)
                    tl.store(workspace + old + n, before)
                    tl.debug_barrier()
            sums = tl.zeros((BORDER_N,), dtype=tl.float32)
            if KINDS & 8:
                if kind == 8:
                    rows = tl.multiple_of(address.to(tl.pointer_type(ROWS_DTYPE)), 16)
                    stride = stride_rk // ALIGN * ALIGN
                    columns = n // ALIGN * ALIGN
                    sums += sum_columns(rows + first * stride, j, count, columns, stride, 1, BORDER_N, BLOCK_K)
            if KINDS & 16:
                if kind == 16:
                    rows = address.to(tl.pointer_type(ROWS_DTYPE)) + first * stride_rk
                    sums += sum_columns(rows, j, count, n, stride_rk, stride_rn, BORDER_N, BLOCK_K)
            if SPLITS:
                tl.store(workspace + slot + j + tl.arange(0, BORDER_N), sums)
            else:
                _store_either_border(factor, sums, j, n, k, alpha, beta, packed, stride_fi, stride_fj, BORDER_N)


@triton.jit
def _finish_strip(
    factor,
    workspace,
    row,
    column,
    strip,
    parts,
    n,
    size,
    alpha,
    beta,
    packed,
    stride_fi,
    stride_fj,
    BLOCK_N: tl.constexpr,
    STRIP: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Add all parts of STRIP columns of a tile and store them; on the diagonal, the lower half is read twice."""
    i = row.to(tl.int32) * BLOCK_N
    j = column.to(tl.int32) * BLOCK_N + strip.to(tl.int32) * STRIP
    r = tl.arange(0, BLOCK_N)[:, None]
    c = strip.to(tl.int32) * STRIP + tl.arange(0, STRIP)[None, :]
    acc = tl.zeros((BLOCK_N, STRIP), dtype=tl.float32)
    if row == column:
        at = tl.where(r >= c, r * BLOCK_N + c, c * BLOCK_N + r)
        for part in range(0, parts):
            acc += tl.load(workspace + tl.cast(part, tl.int64) * (BLOCK_N * BLOCK_N) + at)
    else:
        for part in range(0, parts):
            acc += tl.load(workspace + tl.cast(part, tl.int64) * (BLOCK_N * BLOCK_N) + r * BLOCK_N + c)
    m = row != column
    value = alpha * acc
    if PACKED == "all":
        store_columns(factor, value, i, j, m, n, size, beta, stride_fi, stride_fj, BLOCK_N, STRIP, True)
    elif PACKED == "none":
        store_columns(factor, value, i, j, m, n, size, beta, stride_fi, stride_fj, BLOCK_N, STRIP, False)
    elif packed:
        store_columns(factor, value, i, j, m, n, size, beta, stride_fi, stride_fj, BLOCK_N, STRIP, True)
    else:
        store_columns(factor, value, i, j, m, n, size, beta, stride_fi, stride_fj, BLOCK_N, STRIP, False)


@triton.jit
def _is_not_finite(x):
    return tl.where((x == x) & (tl.abs(x) != float("inf")), 0, 1)


@triton.jit
def _store_statistics(
    traces, nonfinite, workspace, slot, parts, stride, place, n, size, k, alpha, beta, BLOCK: tl.constexpr
):
    """Trace of the new factor and how many numbers on its diagonal are not finite, from the workspace alone."""
    diagonal = workspace + slot
    old = diagonal + parts * stride
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    counts = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < n
        acc = tl.zeros((BLOCK,), dtype=tl.float32)
        for part in range(0, parts):
            acc += tl.load(diagonal + part * stride + offs, mask=mask, other=0.0)
        value = alpha * acc
        if beta != 0.0:
            value += beta * tl.load(old + offs, mask=mask, other=0.0)
        sums += tl.where(mask, value, 0.0)
        counts += tl.where(mask, _is_not_finite(value), 0)
    trace = tl.sum(sums, axis=0)
    count = tl.sum(counts, axis=0)
    if size > n:
        corner = alpha * k
        if beta != 0.0:
            corner += beta * tl.load(old + n)
        trace += corner
        count += _is_not_finite(corner)
    tl.store(traces + place, trace)
    tl.store(nonfinite + place, count)


@triton.jit
def finish_group_kernel(
    # tables and vectors on the device
    addresses,
    shapes,
    items,
    alphas,
    betas,
    workspace,
    traces,
    nonfinite,
    # configuration
    KINDS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SMALL_N: tl.constexpr,
    BORDER_N: tl.constexpr,
    STRIP: tl.constexpr,
    STATISTICS_BLOCK: tl.constexpr,
):
    """A strip of a tile, a block of a border, or the statistics of one matrix."""
    item = items + tl.program_id(0).to(tl.int64) * 8
    kind = tl.load(item)
    m = tl.load(item + 1)
    row = tl.load(item + 2)
    column = tl.load(item + 3)
    strip = tl.load(item + 4)
    slot = tl.load(item + 5)
    parts = tl.load(item + 6).to(tl.int32)
    stride = tl.load(item + 7)
    n, size, k, entry, packed, strides = _load_shape(shapes, m)
    alpha = tl.load(alphas + entry)
    beta = tl.load(betas + entry)
    factor = tl.load(addresses + 2 * m + 1).to(tl.pointer_type(tl.float32))
    stride_fi, stride_fj = strides[2], strides[3]
    if KINDS & 1:
        if kind == 1:
            _finish_strip(
                factor, workspace + slot // 64 * 64, row, column, strip, parts, n, size, alpha, beta, packed,
                stride_fi, stride_fj, BLOCK_N, STRIP if STRIP < BLOCK_N else BLOCK_N, PACKED,
            )  # fmt: skip
    if KINDS & 2:
        if kind == 2:
            _finish_strip(
                factor, workspace + slot // 64 * 64, row, column, strip, parts, n, size, alpha, beta, packed,
                stride_fi, stride_fj, SMALL_N, STRIP if STRIP < SMALL_N else SMALL_N, PACKED,
            )  # fmt: skip
    if KINDS & 8:
        if kind == 8:
            j = column.to(tl.int32) * BORDER_N
            sums = tl.zeros((BORDER_N,), dtype=tl.float32)
            for part in range(0, parts):
                sums += tl.load(workspace + slot + part * stride + j + tl.arange(0, BORDER_N))
            _store_either_border(factor, sums, j, n, k, alpha, beta, packed, stride_fi, stride_fj, BORDER_N)
    if KINDS & 32:
        if kind == 32:
            place = tl.load(shapes + m * 10 + 9)
            _store_statistics(
                traces, nonfinite, workspace, slot, parts, stride, place, n, size, k, alpha, beta, STATISTICS_BLOCK
            )
