# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
# (Triton's language is untyped)
"""The kernels of `cg_update_`, `cg_direction_` and `cg_dots`, each over a table or one tensor of each list."""

import triton
import triton.language as tl

from triton_curv_kernels.pointer_table_device import (
    STEPS,
    find_block,
    length_of_block,
    offsets,
    read,
    record_base,
    record_size,
    record_strides,
    split_index,
    write,
)


@triton.jit
def _update_block(bases, x_offs, r_offs, p_offs, Ap_offs, mask, step, VECTORS: tl.constexpr):
    # without a step, nothing is written and the product is not read
    F32: tl.constexpr = tl.float32
    residual = read(bases[1], r_offs, mask, 0, F32, VECTORS)
    if step != 0:
        solution = read(bases[0], x_offs, mask, 0, F32, VECTORS)
        direction = read(bases[2], p_offs, mask, 0, F32, VECTORS)
        product = read(bases[3], Ap_offs, mask, 0, F32, VECTORS)
        residual -= step * product
        write(bases[0], x_offs, mask, solution + step * direction, 0, F32, VECTORS)
        write(bases[1], r_offs, mask, residual, 0, F32, VECTORS)
    return residual


# None stands for what a call does without: the table, or the pointers of one tensor of each list
@triton.jit(do_not_specialize=["first_partial"])
def cg_update_kernel(
    # the table
    records_ptr,
    blocks_ptr,
    # or dense tensors of `numel` elements in one memory order
    solution_ptr,
    residual_ptr,
    direction_ptr,
    product_ptr,
    # () and one partial sum a program
    step_ptr,
    partial_ptr,
    # sizes without a table
    numel,
    first_partial,
    BLOCK: tl.constexpr,
):
    """x += a p, r -= a A p and, for each program, its part of <r, r>."""
    block = tl.program_id(0)
    step = tl.load(step_ptr).to(tl.float32)
    if records_ptr is not None:
        record, first, vectors = find_block(records_ptr, blocks_ptr, BLOCK, 4)
        bases = (record_base(record, 0), record_base(record, 1), record_base(record, 2), record_base(record, 3))
        if vectors:
            offs = first + tl.arange(0, BLOCK)
            residual = _update_block(bases, offs, offs, offs, offs, None, step, VECTORS=True)
            square = tl.sum(residual * residual)
        else:
            size = record_size(record)
            x_strides, r_strides = record_strides(record, 0, 4), record_strides(record, 1, 4)
            p_strides, Ap_strides = record_strides(record, 2, 4), record_strides(record, 3, 4)
            squares = tl.zeros((BLOCK // STEPS,), tl.float32)
            for start in range(0, length_of_block(first, size, BLOCK), BLOCK // STEPS):
                index, mask = split_index(first + start, size, BLOCK // STEPS)
                x_offs, r_offs = offsets(index, x_strides), offsets(index, r_strides)
                p_offs, Ap_offs = offsets(index, p_strides), offsets(index, Ap_strides)
                residual = _update_block(bases, x_offs, r_offs, p_offs, Ap_offs, mask, step, VECTORS=False)
                squares += residual * residual  # 0 where there is none
            square = tl.sum(squares)
    else:
        bases = (solution_ptr, residual_ptr, direction_ptr, product_ptr)
        offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        residual = _update_block(bases, offs, offs, offs, offs, offs < numel, step, VECTORS=False)
        square = tl.sum(residual * residual)
        block += first_partial
    tl.store(partial_ptr + block, square)


@triton.jit
def _direction_block(bases, p_offs, z_offs, mask, beta, VECTORS: tl.constexpr):
    direction = read(bases[0], p_offs, mask, 0, tl.float32, VECTORS)
    residual = read(bases[1], z_offs, mask, 0, tl.float32, VECTORS)
    write(bases[0], p_offs, mask, residual + beta * direction, 0, tl.float32, VECTORS)


@triton.jit
def cg_direction_kernel(records_ptr, blocks_ptr, direction_ptr, residual_ptr, beta_ptr, numel, BLOCK: tl.constexpr):
    """p <- z + b p."""
    beta = tl.load(beta_ptr).to(tl.float32)
    if records_ptr is not None:
        record, first, vectors = find_block(records_ptr, blocks_ptr, BLOCK, 2)
        bases = (record_base(record, 0), record_base(record, 1))
        if vectors:
            offs = first + tl.arange(0, BLOCK)
            _direction_block(bases, offs, offs, None, beta, VECTORS=True)
        else:
            size = record_size(record)
            p_strides, z_strides = record_strides(record, 0, 2), record_strides(record, 1, 2)
            for start in range(0, length_of_block(first, size, BLOCK), BLOCK // STEPS):
                index, mask = split_index(first + start, size, BLOCK // STEPS)
                _direction_block(bases, offsets(index, p_strides), offsets(index, z_strides), mask, beta, VECTORS=False)
    else:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        _direction_block((direction_ptr, residual_ptr), offs, offs, offs < numel, beta, VECTORS=False)


@triton.jit(do_not_specialize=["first_partial"])
def cg_dots_kernel(
    records_ptr, blocks_ptr, a_ptr, b_ptr, partial_ptr, num_partials, numel, first_partial, BLOCK: tl.constexpr
):
    """Partial sums (2, num_partials), of <a, b> and of <a, a>."""
    block = tl.program_id(0)
    if records_ptr is not None:
        record, first, vectors = find_block(records_ptr, blocks_ptr, BLOCK, 2)
        a_base, b_base = record_base(record, 0), record_base(record, 1)
        if vectors:
            offs = first + tl.arange(0, BLOCK)
            a = read(a_base, offs, None, 0, tl.float32, VECTORS=True)
            ab = tl.sum(a * read(b_base, offs, None, 0, tl.float32, VECTORS=True))
            aa = tl.sum(a * a)
        else:
            size = record_size(record)
            a_strides, b_strides = record_strides(record, 0, 2), record_strides(record, 1, 2)
            ab_sums = tl.zeros((BLOCK // STEPS,), tl.float32)
            aa_sums = tl.zeros((BLOCK // STEPS,), tl.float32)
            for start in range(0, length_of_block(first, size, BLOCK), BLOCK // STEPS):
                index, mask = split_index(first + start, size, BLOCK // STEPS)
                a = read(a_base, offsets(index, a_strides), mask, 0, tl.float32, VECTORS=False)
                b = read(b_base, offsets(index, b_strides), mask, 0, tl.float32, VECTORS=False)
                ab_sums += a * b
                aa_sums += a * a
            ab, aa = tl.sum(ab_sums), tl.sum(aa_sums)
    else:
        offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        a = read(a_ptr, offs, offs < numel, 0, tl.float32, VECTORS=False)
        b = read(b_ptr, offs, offs < numel, 0, tl.float32, VECTORS=False)
        ab, aa = tl.sum(a * b), tl.sum(a * a)
        block += first_partial
    tl.store(partial_ptr + block, ab)
    tl.store(partial_ptr + num_partials + block, aa)
