# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""Heavy-ball momentum with decoupled weight decay over lists of tensors, and one scale for each update.

    u = scale * update
    m = momentum * m + u
    p = (1 - lr * weight_decay) * p - lr * (momentum_weight * m + update_weight * u)

(momentum_weight, update_weight) = (1, 0) is plain heavy ball, (momentum, 1) Nesterov's look-ahead as torch.optim.SGD
writes it; both divided by 1 - momentum^t take out the average's start.

Shapes: three lists of tensors of pairwise equal shapes and any strides; `scales`: as many 0-dim tensors;
`hyper` (5,) = [lr, momentum, weight_decay, momentum_weight, update_weight], on the tensors' device, so that neither
new values nor a CUDA graph need a new compilation. Dtypes: params and updates fp32, fp16 or bf16, momenta fp32; the
reference takes fp64, too. Arithmetic is fp32 and parameters are rounded once.
Source: Loshchilov and Hutter, arXiv 1711.05101 (decoupled decay); the scales carry KL clipping, arXiv 1811.12019.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.backend import UnsupportedInputError, use_reference, wrap_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def momentum_update_reference(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    hyper: Tensor,
) -> None:
    """The update as five `torch._foreach_*` calls, in place and without a look at any value."""
    if not params:
        return  # foreach functions refuse empty lists
    lr, momentum, weight_decay, momentum_weight, update_weight = hyper.unbind()
    wide = [p if p.dtype == m.dtype else p.to(m.dtype) for p, m in zip(params, momentum_buffers, strict=True)]
    torch._foreach_mul_(momentum_buffers, momentum)
    torch._foreach_addcmul_(momentum_buffers, updates, scales)
    torch._foreach_mul_(wide, 1 - lr * weight_decay)
    torch._foreach_addcmul_(wide, momentum_buffers, [-lr * momentum_weight] * len(wide))
    torch._foreach_addcmul_(wide, updates, torch._foreach_mul(scales, -lr * update_weight))
    for param, result in zip(params, wide, strict=True):
        if result is not param:
            param.copy_(result)


@dataclass(frozen=True)
class MomentumConfig:
    """Programs handle BLOCK elements: rows of the innermost dimension, several if it is short."""

    BLOCK: int = 2048
    num_warps: int = 4


CONFIGS: list[MomentumConfig] = [MomentumConfig(block, warps) for block in (512, 1024, 2048, 4096) for warps in (4, 8)]


def prune(configs: Sequence[MomentumConfig], numel: int) -> list[MomentumConfig]:
    """Programs that have work for all their threads: no more than twice `numel` elements, 4 to 32 a thread."""
    most = max(configs[0].BLOCK, 2 * numel)
    return [c for c in configs if most >= c.BLOCK and c.BLOCK // (32 * c.num_warps) in range(4, 33)]


def default_config(numel: int) -> MomentumConfig:
    """Analytic choice: 16 elements a thread, 4 for small tensors, so that more multiprocessors have some."""
    return MomentumConfig(2048, 4) if numel >= 1 << 18 else MomentumConfig(512, 4)


@triton.jit
def _momentum_update_kernel(
    # tensors, a scalar and a vector in device memory
    param_ptr,
    momentum_ptr,
    update_ptr,
    scale_ptr,
    hyper_ptr,
    # sizes: the tensors are (outer, middle, inner)
    rows,  # outer * middle
    middle,
    inner,
    # strides
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    across = tl.cdiv(inner, BLOCK_INNER)
    row = (tl.program_id(0) // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i = (tl.program_id(0) % across).to(tl.int64) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    mask = (row[:, None] < rows) & (i[None, :] < inner)
    o = (row // middle).to(tl.int64)
    m = (row % middle).to(tl.int64)
    p_ptrs = param_ptr + (o * stride_po + m * stride_pm)[:, None] + (i * stride_pi)[None, :]
    m_ptrs = momentum_ptr + (o * stride_mo + m * stride_mm)[:, None] + (i * stride_mi)[None, :]
    u_ptrs = update_ptr + (o * stride_uo + m * stride_um)[:, None] + (i * stride_ui)[None, :]

    lr = tl.load(hyper_ptr).to(tl.float32)
    momentum = tl.load(hyper_ptr + 1).to(tl.float32)
    weight_decay = tl.load(hyper_ptr + 2).to(tl.float32)
    momentum_weight = tl.load(hyper_ptr + 3).to(tl.float32)
    update_weight = tl.load(hyper_ptr + 4).to(tl.float32)

    update = tl.load(u_ptrs, mask=mask, other=0.0).to(tl.float32) * tl.load(scale_ptr).to(tl.float32)
    velocity = momentum * tl.load(m_ptrs, mask=mask, other=0.0) + update
    step = momentum_weight * velocity + update_weight * update
    param = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32) * (1.0 - lr * weight_decay) - lr * step
    tl.store(m_ptrs, velocity, mask=mask)
    tl.store(p_ptrs, param.to(param_ptr.dtype.element_ty), mask=mask)


class _Axis(NamedTuple):
    """A dimension that several tensors share: its size and its stride in each of them."""

    size: int
    strides: tuple[int, ...]


def merged_axes(*tensors: Tensor) -> list[_Axis]:
    """The fewest dimensions that describe tensors of one shape, in the first one's memory order and none of size 1."""
    axes = [
        _Axis(n, s) for n, s in zip(tensors[0].shape, zip(*(t.stride() for t in tensors), strict=True), strict=True)
    ]
    merged: list[_Axis] = []
    for axis in sorted((a for a in axes if a.size != 1), key=lambda a: a.strides[0], reverse=True):
        if merged and all(o == i * axis.size for o, i in zip(merged[-1].strides, axis.strides, strict=True)):
            axis = _Axis(merged.pop().size * axis.size, axis.strides)
        merged.append(axis)
    return merged


def supports(params: Sequence[Tensor], momentum_buffers: Sequence[Tensor], updates: Sequence[Tensor]) -> bool:
    """Whether the Triton path takes these dtypes: fp32, fp16 or bf16 params and updates, fp32 momenta.

    For others, fp64 say, the op takes the reference.
    """
    return all(t.dtype in DTYPES for t in (*params, *updates)) and all(
        t.dtype == torch.float32 for t in momentum_buffers
    )


def launch_momentum_update_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    hyper: Tensor,
    config: MomentumConfig | None = None,
) -> None:
    """`momentum_update_` by Triton, whatever the device: one launch a tensor, more if its strides need 4 dimensions."""
    _check(params, momentum_buffers, updates, scales, hyper)
    if not supports(params, momentum_buffers, updates):
        raise UnsupportedInputError(
            "expected fp32, fp16 or bf16 params and updates and fp32 momenta, got "
            f"{sorted({str(t.dtype) for t in (*params, *updates)})} and "
            f"{sorted({str(t.dtype) for t in momentum_buffers})}"
        )
    for param, momentum, update, scale in zip(params, momentum_buffers, updates, scales, strict=True):
        if param.numel() > 0:
            chosen = config or default_config(param.numel())
            for p, m, u, axes in _three_dimensional(param, momentum, update):
                outer, middle, inner = axes
                block_inner = min(chosen.BLOCK, triton.next_power_of_2(inner.size))
                block_rows = chosen.BLOCK // block_inner
                rows = outer.size * middle.size
                strides = zip(outer.strides, middle.strides, inner.strides, strict=True)
                wrap_triton(_momentum_update_kernel)[
                    (triton.cdiv(rows, block_rows) * triton.cdiv(inner.size, block_inner),)
                ](
                    p,
                    m,
                    u,
                    scale,
                    hyper,
                    rows,
                    middle.size,
                    inner.size,
                    *(stride for of_tensor in strides for stride in of_tensor),
                    BLOCK_ROWS=block_rows,
                    BLOCK_INNER=block_inner,
                    num_warps=chosen.num_warps,
                )


def _three_dimensional(*tensors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, list[_Axis]]]:
    """The tensors, or slices of them that three merged dimensions describe.

    Weights of linear and conv layers need no slices, whatever the order of their momenta's memory.
    """
    axes = merged_axes(*tensors)
    if len(axes) <= 3:
        one = _Axis(1, (0,) * len(tensors))
        yield *tensors, [one] * (3 - len(axes)) + axes
    else:
        for slices in zip(*(t.unbind(0) for t in tensors), strict=True):
            yield from _three_dimensional(*slices)


def _check(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    hyper: Tensor,
) -> None:
    if not len(params) == len(momentum_buffers) == len(updates) == len(scales):
        raise UnsupportedInputError(
            "expected lists of one length, got "
            f"{len(params)} params, {len(momentum_buffers)} momenta, {len(updates)} updates, {len(scales)} scales"
        )
    if hyper.shape != (5,):
        raise UnsupportedInputError(
            "expected hyper (5,) = [lr, momentum, weight_decay, momentum_weight, update_weight], got "
            f"{tuple(hyper.shape)}"
        )
    for index, (p, m, u, s) in enumerate(zip(params, momentum_buffers, updates, scales, strict=True)):
        if not p.shape == m.shape == u.shape or s.dim() != 0:
            raise UnsupportedInputError(
                f"expected tensors of one shape and a 0-dim scale at place {index}, got {tuple(p.shape)}, "
                f"{tuple(m.shape)}, {tuple(u.shape)} and {tuple(s.shape)}"
            )


@triton_op("triton_curv::momentum_update_", mutates_args={"params", "momentum_buffers"})
def _momentum_update_op(
    params: list[Tensor], momentum_buffers: list[Tensor], updates: list[Tensor], scales: list[Tensor], hyper: Tensor
) -> None:
    if use_reference(hyper) or not supports(params, momentum_buffers, updates):
        _check(params, momentum_buffers, updates, scales, hyper)
        momentum_update_reference(params, momentum_buffers, updates, scales, hyper)
    else:
        launch_momentum_update_(params, momentum_buffers, updates, scales, hyper)


def momentum_update_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    hyper: Tensor,
) -> None:
    """`m.mul_(momentum).add_(s * u); p.mul_(1 - lr * wd).sub_(lr * (momentum_weight * m + update_weight * s * u))`.

    Args:
        params: changed in place; any strides; call it under `torch.no_grad()`.
        momentum_buffers: changed in place; fp32 (fp64 with fp64 params), any strides.
        updates: directions to descend along; any strides.
        scales: 0-dim tensors, one for each update.
        hyper: (5,) = [lr, momentum, weight_decay, momentum_weight, update_weight], on the tensors' device.

    Raises:
        UnsupportedInputError: lists that do not match.

    """
    if not torch.compiler.is_compiling() and use_reference(hyper):
        _check(params, momentum_buffers, updates, scales, hyper)
        momentum_update_reference(params, momentum_buffers, updates, scales, hyper)
    else:
        torch.ops.triton_curv.momentum_update_(params, momentum_buffers, updates, scales, hyper)
