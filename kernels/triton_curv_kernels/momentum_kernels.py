# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
# (Triton's language is untyped)
"""The two kernels of `momentum_update_`: momentum and parameters, and weights rescaled by what the first one summed."""

import triton
import triton.language as tl

from triton_curv_kernels.pointer_table_device import (
    STEPS,
    find_block,
    length_of_block,
    offsets,
    read,
    record_base,
    record_code,
    record_size,
    record_strides,
    split_index,
    sum_of,
    write,
)


@triton.jit
def _update_block(
    bases,  # of param, momentum and update: addresses or pointers
    param_offs,
    momentum_offs,
    update_offs,
    mask,
    scale,
    hyper,
    codes,  # of the dtypes of param and update
    PARAM: tl.constexpr,
    UPDATE: tl.constexpr,
    COUPLED: tl.constexpr,
    VECTORS: tl.constexpr,
):
    lr, momentum, weight_decay, momentum_weight, update_weight = hyper
    param = read(bases[0], param_offs, mask, codes[0], PARAM, VECTORS)
    velocity = read(bases[1], momentum_offs, mask, 0, tl.float32, VECTORS)
    update = scale * read(bases[2], update_offs, mask, codes[1], UPDATE, VECTORS)
    if COUPLED:
        update += weight_decay * param
    else:
        param *= 1.0 - lr * weight_decay
    velocity = momentum * velocity + update
    param -= lr * (momentum_weight * velocity + update_weight * update)
    write(bases[1], momentum_offs, mask, velocity, 0, tl.float32, VECTORS)
    return write(bases[0], param_offs, mask, param, codes[0], PARAM, VECTORS)


@triton.jit
def _update_strided(
    bases,
    first,
    size,
    param_strides,
    momentum_strides,
    update_strides,
    scale,
    hyper,
    codes,
    PARAM: tl.constexpr,
    UPDATE: tl.constexpr,
    COUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    squares = tl.zeros((BLOCK // STEPS,), tl.float32)
    for start in range(0, length_of_block(first, size, BLOCK), BLOCK // STEPS):
        index, mask = split_index(first + start, size, BLOCK // STEPS)
        param_offs = offsets(index, param_strides)
        momentum_offs = offsets(index, momentum_strides)
        update_offs = offsets(index, update_strides)
        stored = _update_block(
            bases, param_offs, momentum_offs, update_offs, mask, scale, hyper, codes, PARAM, UPDATE, COUPLED, False
        )
        squares += stored * stored  # 0 where there is no element
    return tl.sum(squares)


# None stands for what a call does without: the table, or one tensor's pointers, sizes, starts and strides
@triton.jit(do_not_specialize=["first_block"])
def momentum_update_kernel(
    # the table
    records_ptr,
    blocks_ptr,
    # or one tensor of each list
    param_ptr,
    momentum_ptr,
    update_ptr,
    # the (first) scale, (5,), one partial square sum a program
    scale_ptr,
    hyper_ptr,
    partial_ptr,
    # sizes, place among the partial sums, starts and strides (outer, middle, inner) of the one tensor
    numel,
    inner,
    middle,
    first_block,
    start_p,
    start_m,
    start_u,
    stride_po,
    stride_pm,
    stride_pi,
    stride_mo,
    stride_mm,
    stride_mi,
    stride_uo,
    stride_um,
    stride_ui,
    # configuration
    PARAM: tl.constexpr,
    UPDATE: tl.constexpr,
    COUPLED: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m and p of one block and, if there is a place for it, the square sum of the new p."""
    lr = tl.load(hyper_ptr).to(tl.float32)
    momentum = tl.load(hyper_ptr + 1).to(tl.float32)
    weight_decay = tl.load(hyper_ptr + 2).to(tl.float32)
    momentum_weight = tl.load(hyper_ptr + 3).to(tl.float32)
    update_weight = tl.load(hyper_ptr + 4).to(tl.float32)
    hyper = (lr, momentum, weight_decay, momentum_weight, update_weight)
    block = tl.program_id(0)
    if records_ptr is not None:
        record, first, vectors = find_block(records_ptr, blocks_ptr, BLOCK, 3)
        scale_address = scale_ptr.to(tl.int64) + tl.load(record + 6)
        scale = tl.load(scale_address.to(tl.pointer_type(scale_ptr.dtype.element_ty))).to(tl.float32)
        bases = (record_base(record, 0), record_base(record, 1), record_base(record, 2))
        codes = (record_code(record, 0, 3), record_code(record, 2, 3))
        if vectors:
            offs = first + tl.arange(0, BLOCK)
            stored = _update_block(
                bases, offs, offs, offs, None, scale, hyper, codes, PARAM, UPDATE, COUPLED, VECTORS=True
            )
            square = tl.sum(stored * stored)
        else:
            p_strides, m_strides = record_strides(record, 0, 3), record_strides(record, 1, 3)
            u_strides = record_strides(record, 2, 3)
            size = record_size(record)
            square = _update_strided(
                bases, first, size, p_strides, m_strides, u_strides, scale, hyper, codes, PARAM, UPDATE, COUPLED, BLOCK
            )
    else:
        scale = tl.load(scale_ptr).to(tl.float32)
        bases = (param_ptr + start_p, momentum_ptr + start_m, update_ptr + start_u)
        first = block.to(tl.int64) * BLOCK
        size = (tl.cast(numel, tl.int64), tl.cast(inner, tl.int64), tl.cast(middle, tl.int64))  # a 1 is a constant
        p_strides, m_strides = (stride_po, stride_pm, stride_pi), (stride_mo, stride_mm, stride_mi)
        u_strides = (stride_uo, stride_um, stride_ui)
        if DENSE:
            offs = first + tl.arange(0, BLOCK)
            mask = offs < numel
            stored = _update_block(
                bases, offs, offs, offs, mask, scale, hyper, (0, 0), PARAM, UPDATE, COUPLED, VECTORS=False
            )
            square = tl.sum(stored * stored)  # 0 where there is no element
        else:
            square = _update_strided(
                bases, first, size, p_strides, m_strides, u_strides, scale, hyper, (0, 0), PARAM, UPDATE, COUPLED, BLOCK
            )
        block += first_block
    if partial_ptr is not None:
        tl.store(partial_ptr + block, square)


@triton.jit
def _rescale_strided(base, first, size, strides, code, factor, PARAM: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, length_of_block(first, size, BLOCK), BLOCK // STEPS):
        index, mask = split_index(first + start, size, BLOCK // STEPS)
        offs = offsets(index, strides)
        value = factor * read(base, offs, mask, code, PARAM, False)
        write(base, offs, mask, value, code, PARAM, False)


@triton.jit
def _factor(partial_ptr, first_block, num_blocks, length, EPS: tl.constexpr):
    return length / (tl.sqrt(sum_of(partial_ptr + first_block, num_blocks, 1024)) + EPS)


@triton.jit(do_not_specialize=["first_block", "num_blocks", "length"])
def rescale_kernel(
    # the table
    records_ptr,
    blocks_ptr,
    # or one parameter
    param_ptr,
    # all partial square sums
    partial_ptr,
    # sizes, which partial sums, length, start and strides of the one parameter
    numel,
    inner,
    middle,
    first_block,
    num_blocks,
    length,
    start,
    stride_o,
    stride_m,
    stride_i,
    # configuration
    PARAM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p <- length p / (||p|| + EPS), with ||p||^2 from the partial sums of the first kernel."""
    if records_ptr is not None:
        record, first, vectors = find_block(records_ptr, blocks_ptr, BLOCK, 3)
        wanted = tl.load(record + 7).to(tl.int32).to(tl.float32, bitcast=True)
        if wanted > 0:
            base, code = record_base(record, 0), record_code(record, 0, 3)
            factor = _factor(partial_ptr, tl.load(record + 4), tl.load(record + 5).to(tl.int32), wanted, EPS)
            if vectors:
                offs = first + tl.arange(0, BLOCK)
                value = factor * read(base, offs, None, code, PARAM, True)
                write(base, offs, None, value, code, PARAM, True)
            else:
                strides = record_strides(record, 0, 3)
                _rescale_strided(base, first, record_size(record), strides, code, factor, PARAM, BLOCK)
    else:
        factor = _factor(partial_ptr, first_block, num_blocks, length, EPS)
        first = tl.program_id(0).to(tl.int64) * BLOCK
        size = (tl.cast(numel, tl.int64), tl.cast(inner, tl.int64), tl.cast(middle, tl.int64))  # a 1 is a constant
        strides = (stride_o, stride_m, stride_i)
        _rescale_strided(param_ptr + start, first, size, strides, 0, factor, PARAM, BLOCK)
