# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, SIM108
# (Triton's language is untyped)
"""What kernels over a `PointerTable` share: finding their block, reading and writing it, finishing sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_curv_kernels.backend import wrap_triton
from triton_curv_kernels.pointer_table import HEADER

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, None: None}
FINISH_BLOCK = 8192  # the norm of 124 million elements in 8 rounds of loads
STEPS = tl.constexpr(8)  # a block that is not read as vectors is taken in parts: indices and offsets need registers
_HEADER = tl.constexpr(HEADER)


@triton.jit
def find_block(records_ptr, blocks_ptr, BLOCK: tl.constexpr, LISTS: tl.constexpr):
    """The record of this program, its first element, and whether the block is whole and aligned."""
    entry = tl.load(blocks_ptr + tl.program_id(0))
    record = records_ptr + (entry >> 32) * (_HEADER + 5 * LISTS)
    first = (entry & 0xFFFFFFFF) * BLOCK
    vectors = (tl.load(record + 1) != 0) & (first + BLOCK <= tl.load(record))
    return record, first, vectors


@triton.jit
def split_index(first, size, COUNT: tl.constexpr):
    """(outer, middle, inner) of COUNT elements from `first` on, and which there are; size = numel, inner, middle."""
    numel, inner, middle = size
    within = tl.arange(0, COUNT)
    row = first // inner
    i = (first % inner).to(tl.int32) + within
    m = (row % middle).to(tl.int32) + i // inner.to(tl.int32)
    o = row // middle + m // middle.to(tl.int32)
    m = (m % middle.to(tl.int32)).to(tl.int64)
    return (o, m, (i % inner.to(tl.int32)).to(tl.int64)), first + within < numel


@triton.jit
def length_of_block(first, size, BLOCK: tl.constexpr):
    """How many of the block's elements there are."""
    return tl.minimum(size[0] - first, BLOCK).to(tl.int32)


@triton.jit
def offsets(index, strides):
    """Where elements lie, in elements."""
    return index[0] * strides[0] + index[1] * strides[1] + index[2] * strides[2]


@triton.jit
def record_size(record):
    """numel, inner, middle: see `split_index`."""
    return tl.load(record), tl.load(record + 2), tl.load(record + 3)


@triton.jit
def record_strides(record, WHICH: tl.constexpr, LISTS: tl.constexpr):
    """Of list WHICH: (outer, middle, inner)."""
    strides = record + _HEADER + LISTS + 3 * WHICH
    return tl.load(strides), tl.load(strides + 1), tl.load(strides + 2)


@triton.jit
def record_base(record, WHICH: tl.constexpr):
    """Address of the tensor of list WHICH."""
    return tl.load(record + _HEADER + WHICH)


@triton.jit
def record_code(record, WHICH: tl.constexpr, LISTS: tl.constexpr):
    """Which dtype the tensor of list WHICH has."""
    return tl.load(record + _HEADER + 4 * LISTS + WHICH)


@triton.jit
def _read_as(base, offs, mask, DTYPE: tl.constexpr, VECTORS: tl.constexpr):
    ptr = base.to(tl.pointer_type(DTYPE))
    if VECTORS:
        value = tl.load(tl.multiple_of(ptr, 16) + offs)
    else:
        value = tl.load(ptr + offs, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def read(base, offs, mask, code, DTYPE: tl.constexpr, VECTORS: tl.constexpr):
    """A block in fp32. `base` is an address or a pointer; where DTYPE is None, `code` tells the dtype."""
    if DTYPE is not None:
        value = _read_as(base, offs, mask, DTYPE, VECTORS)
    elif code == 0:
        value = _read_as(base, offs, mask, tl.float32, VECTORS)
    elif code == 1:
        value = _read_as(base, offs, mask, tl.float16, VECTORS)
    else:
        value = _read_as(base, offs, mask, tl.bfloat16, VECTORS)
    return value


@triton.jit
def _write_as(base, offs, mask, value, DTYPE: tl.constexpr, VECTORS: tl.constexpr):
    ptr = base.to(tl.pointer_type(DTYPE))
    stored = value.to(DTYPE)
    if VECTORS:
        tl.store(tl.multiple_of(ptr, 16) + offs, stored)
    else:
        tl.store(ptr + offs, stored, mask=mask)
    return stored.to(tl.float32)


@triton.jit
def write(base, offs, mask, value, code, DTYPE: tl.constexpr, VECTORS: tl.constexpr):
    """Store fp32 values, rounded to the tensor's dtype, and return them as stored."""
    if DTYPE is not None:
        stored = _write_as(base, offs, mask, value, DTYPE, VECTORS)
    elif code == 0:
        stored = _write_as(base, offs, mask, value, tl.float32, VECTORS)
    elif code == 1:
        stored = _write_as(base, offs, mask, value, tl.float16, VECTORS)
    else:
        stored = _write_as(base, offs, mask, value, tl.bfloat16, VECTORS)
    return stored


@triton.jit
def sum_of(partial_ptr, num_partials, BLOCK: tl.constexpr):
    """The sum of partial sums, by one program, in a fixed order."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_partials, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + offs, mask=offs < num_partials, other=0.0)
    return tl.sum(sums)


@triton.jit
def _finish_kernel(partial_ptr, out_ptr, num_partials, SQRT: tl.constexpr, BLOCK: tl.constexpr):
    # out[i] = sum of row i of partials (rows, num_partials)
    row = tl.program_id(0).to(tl.int64)
    total = sum_of(partial_ptr + row * num_partials, num_partials, BLOCK)
    if SQRT:
        total = tl.sqrt(total)
    tl.store(out_ptr + row, total)


def launch_finish(partials: Tensor, out: Tensor, sqrt: bool = False) -> None:
    """`out.copy_(partials.sum(-1))`, or its square root, in a fixed order; partials fp32 (rows, n), out (rows,)."""
    wrap_triton(_finish_kernel)[(partials.shape[0],)](
        partials, out, partials.shape[1], SQRT=sqrt, BLOCK=FINISH_BLOCK, num_warps=16
    )
