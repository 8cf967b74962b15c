# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""The kernels of `damped_inverse_`; see there for the algorithm.

Matrices lie in workspaces, padded with zeros to a multiple of a tile, so that loads need no masks and are wide whatever
n is; padding stays 0. Tables (see damped_inverse_work.py) say which program does which tile of which matrix: each
launch covers all of them. Programs of a matrix that is done return at once. All products have the form left right^T,
both read along rows, which TF32 tensor cores require.

State of matrix m, in fp32: state[0, m] the residual before, state[1, m] 1 - rho, state[2, m] the weight of the step,
state[3, m] and state[4, m] scale and 1 - rho of a cold start.
"""

import triton
import triton.language as tl

# what becomes of a matrix in this step
WARM = tl.constexpr(0)
COLD = tl.constexpr(1)
STARTING = tl.constexpr(2)  # cold, from now on
DONE = tl.constexpr(3)


@triton.jit
def _multiply(
    left,
    right,
    i,
    j,
    size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(left right^T)[i:i + BLOCK_M, j:j + BLOCK_N] of matrices (size, size) whose size is a multiple of all blocks."""
    offs_k = tl.arange(0, BLOCK_K)
    left_ptrs = left + (i + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * size + offs_k[None, :]
    right_ptrs = right + (j + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * size + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64 if PRECISION == "fp64" else tl.float32)
    for _ in range(0, size, BLOCK_K):
        x = tl.load(left_ptrs)
        y = tl.load(right_ptrs)
        if PRECISION == "fp64":
            acc = tl.dot(x.to(tl.float64), tl.trans(y.to(tl.float64)), acc, out_dtype=tl.float64)
        else:
            acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
        left_ptrs += BLOCK_K
        right_ptrs += BLOCK_K
    return acc


@triton.jit
def _matrix(matrices, m):
    """Offset, n and padded size of matrix m; offsets and sizes are multiples of 16, which allows wide loads."""
    offset = tl.multiple_of(tl.load(matrices + m * 6), 16)
    n = tl.load(matrices + m * 6 + 1).to(tl.int32)
    size = tl.multiple_of(tl.load(matrices + m * 6 + 2).to(tl.int32), 16)
    return offset, n, size


@triton.jit
def _store_both(out, value, i, j, size, BLOCK_N: tl.constexpr):
    """Tile [i:, j:] on or below the diagonal and its mirror image; one on the diagonal is made symmetric."""
    in_block = tl.arange(0, BLOCK_N)
    if i == j:
        value = tl.where(in_block[None, :] <= in_block[:, None], value, tl.trans(value))
    offs_i = (i + in_block).to(tl.int64)
    offs_j = (j + in_block).to(tl.int64)
    tl.store(out + offs_i[:, None] * size + offs_j[None, :], value)
    if i != j:
        tl.store(out + offs_j[:, None] * size + offs_i[None, :], tl.trans(value))


@triton.jit
def bounds_kernel(matrices, panels, damped, bounds, BLOCK_N: tl.constexpr):
    """Of BLOCK_N rows of A: largest absolute sum, and least diagonal element minus the others' absolute sum."""
    p = tl.program_id(0)
    m = tl.load(panels + p * 2)
    i = tl.load(panels + p * 2 + 1)
    offset, n, size = _matrix(matrices, m)
    offs_i = i + tl.arange(0, BLOCK_N)
    ptrs = damped + offset + offs_i.to(tl.int64)[:, None] * size + tl.arange(0, BLOCK_N)[None, :]
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for _ in range(0, size, BLOCK_N):
        sums += tl.sum(tl.abs(tl.load(ptrs)), axis=1)
        ptrs += BLOCK_N
    diagonal = tl.load(damped + offset + offs_i.to(tl.int64) * (size + 1))
    least = tl.where(offs_i < n, diagonal - (sums - tl.abs(diagonal)), float("inf"))
    spoiled = tl.sum(sums * 0.0, axis=0)  # NaN if one of them is NaN or Inf: a maximum might lose it
    tl.store(bounds + p * 2, tl.max(sums, axis=0) + spoiled)
    tl.store(bounds + p * 2 + 1, tl.min(least, axis=0) + spoiled)


@triton.jit
def start_kernel(matrices, bounds, shifts, modes, state, count, SLACK: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program a matrix: the cold start's scale and 1 - rho, and the state before the first step."""
    m = tl.program_id(0)
    _, n, size = _matrix(matrices, m)
    panel_ptr = bounds + tl.load(matrices + m * 6 + 4) * 2
    place = tl.load(matrices + m * 6 + 5)
    upper = 0.0
    lower = float("inf")
    spoiled = 0.0
    for _ in range(0, size, BLOCK_N):
        largest = tl.load(panel_ptr)
        spoiled += largest * 0.0
        upper = tl.maximum(upper, largest)
        lower = tl.minimum(lower, tl.load(panel_ptr + 1))
        panel_ptr += 2
    lower = tl.maximum(lower, tl.load(shifts + place))
    total = lower + upper * SLACK + spoiled
    tl.store(modes + m, WARM)
    tl.store(state + m, tl.sqrt(n.to(tl.float32)))
    tl.store(state + count + m, 1.0)
    tl.store(state + 2 * count + m, 1.0)
    tl.store(state + 3 * count + m, 2.0 / total)
    tl.store(state + 4 * count + m, 2.0 * lower / total)


@triton.jit
def residual_kernel(
    # tables
    matrices,
    tiles,
    modes,
    # the padded matrices, and a sum for each program
    inverse,
    damped,
    left,
    partials,
    # configuration
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """L = I - X A, the transpose of R, and the sum of squares of each tile."""
    p = tl.program_id(0)
    m = tl.load(tiles + p * 3)
    if tl.load(modes + m) != DONE:
        i = tl.load(tiles + p * 3 + 1)
        j = tl.load(tiles + p * 3 + 2)
        offset, n, size = _matrix(matrices, m)
        acc = _multiply(inverse + offset, damped + offset, i, j, size, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        offs_i = i + tl.arange(0, BLOCK_M)
        offs_j = j + tl.arange(0, BLOCK_N)
        identity = (offs_i[:, None] == offs_j[None, :]) & (offs_i[:, None] < n)
        value = (identity.to(acc.dtype) - acc).to(tl.float32)
        tl.store(left + offset + offs_i.to(tl.int64)[:, None] * size + offs_j[None, :], value)
        tl.store(partials + p, tl.sum(tl.sum(value * value, axis=1), axis=0))


@triton.jit
def decide_kernel(
    # tables
    matrices,
    modes,
    # sums of squares, state of each matrix, and what is returned
    partials,
    state,
    residuals,
    count,
    # configuration
    ORDER: tl.constexpr,
    LAST: tl.constexpr,
    TOLERANCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a matrix: ||R||_F, what becomes of the matrix, and the weight of its next step."""
    m = tl.program_id(0)
    mode = tl.load(modes + m)
    if mode != DONE:
        _, n, size = _matrix(matrices, m)
        first = tl.load(matrices + m * 6 + 3)
        total = (size // BLOCK_M) * (size // BLOCK_N)
        offs = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, total, BLOCK):
            sums += tl.load(partials + first + start + offs, mask=start + offs < total, other=0.0)
        residual = tl.sqrt(tl.sum(sums, axis=0))
        tl.store(residuals + tl.load(matrices + m * 6 + 5), residual)
        if not LAST:
            of_zero = tl.sqrt(n.to(tl.float32))
            previous = tl.load(state + m)
            delta = tl.load(state + count + m)
            restart = (mode == WARM) & (((residual < 1.0) | (residual <= previous * 0.5)) == 0)
            stalled = (previous < 0.5) & (residual > previous * 0.5)
            diverged = (mode != WARM) & ((residual <= 2.0 * of_zero) == 0)  # so is NaN
            ended = stalled | diverged | (residual <= TOLERANCE * of_zero)
            goes_on = tl.where(mode == WARM, WARM, COLD)
            tl.store(modes + m, tl.where(restart, STARTING, tl.where(ended, DONE, goes_on)))
            delta = tl.where(restart, tl.load(state + 4 * count + m), tl.where(residual < 1.0, 1.0, delta))
            curved = delta * (2.0 - delta)  # 1 - rho^2
            if ORDER == 2:
                weight = 2.0 / (1.0 + curved)
                delta = 2.0 * curved / (1.0 + curved)
            else:
                weight = 4.0 / (1.0 + 3.0 * curved)
                delta = delta * (3.0 - delta) * (3.0 - delta) / (1.0 + 3.0 * curved)
            tl.store(state + m, tl.where(restart, of_zero, residual))
            tl.store(state + count + m, delta)
            tl.store(state + 2 * count + m, weight)


@triton.jit
def correction_kernel(
    # tables and state
    matrices,
    triangle,
    modes,
    state,
    count,
    # the padded matrices
    inverse,
    damped,
    left,
    correction,
    # configuration
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W = X R. Of a matrix that starts cold, X = c I, R = I - c A and W = c R, all three written."""
    p = tl.program_id(0)
    m = tl.load(triangle + p * 3)
    mode = tl.load(modes + m)
    if mode != DONE:
        i = tl.load(triangle + p * 3 + 1)
        j = tl.load(triangle + p * 3 + 2)
        offset, n, size = _matrix(matrices, m)
        if mode == STARTING:
            scale = tl.load(state + 3 * count + m)
            offs_i = i + tl.arange(0, BLOCK_N)
            offs_j = j + tl.arange(0, BLOCK_N)
            identity = ((offs_i[:, None] == offs_j[None, :]) & (offs_i[:, None] < n)).to(tl.float32)
            a = tl.load(damped + offset + offs_i.to(tl.int64)[:, None] * size + offs_j[None, :])
            residual = identity - scale * a
            _store_both(inverse + offset, scale * identity, i, j, size, BLOCK_N)
            _store_both(left + offset, residual, i, j, size, BLOCK_N)
            _store_both(correction + offset, scale * residual, i, j, size, BLOCK_N)
        else:
            acc = _multiply(inverse + offset, left + offset, i, j, size, BLOCK_N, BLOCK_N, BLOCK_K, PRECISION)
            _store_both(correction + offset, acc, i, j, size, BLOCK_N)


@triton.jit
def update_kernel(
    # tables and state
    matrices,
    triangle,
    modes,
    state,
    count,
    # the padded matrices
    inverse,
    left,
    correction,
    # configuration
    ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X <- X + weight (W + W R), or X <- weight (X + W), in place: a program reads no tile of X but its own."""
    p = tl.program_id(0)
    m = tl.load(triangle + p * 3)
    if tl.load(modes + m) != DONE:
        i = tl.load(triangle + p * 3 + 1)
        j = tl.load(triangle + p * 3 + 2)
        offset, _, size = _matrix(matrices, m)
        weight = tl.load(state + 2 * count + m)
        offs_i = (i + tl.arange(0, BLOCK_N)).to(tl.int64)
        offs_j = (j + tl.arange(0, BLOCK_N)).to(tl.int64)
        at = offset + offs_i[:, None] * size + offs_j[None, :]
        if ORDER == 2:
            value = weight * (tl.load(inverse + at) + tl.load(correction + at))
        else:
            acc = _multiply(correction + offset, left + offset, i, j, size, BLOCK_N, BLOCK_N, BLOCK_K, PRECISION)
            value = tl.load(inverse + at) + weight * (tl.load(correction + at) + acc)
        _store_both(inverse + offset, value, i, j, size, BLOCK_N)
