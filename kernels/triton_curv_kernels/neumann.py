# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""Neumann update over a list of tensors, fused with the global norm that the next update needs.

With w the displaced weights, v their moving average, m the Neumann iterate, g the gradient and
D = ||w - v||_2 over the whole parameter vector of n variables:

    d = g + (alpha D^2 - beta n / D^2) (w - v) / D
    m = mu m - lr d
    w = w + mu m - lr d
    v = w + gamma (v - w)
    D = ||w - v||_2 = gamma ||w - v_old||_2

The last line is why one pass is enough: the new distance is summed while the new weights are in registers.
The denominators hold max(D, 1e-8): at D = 0, where w - v is 0, the regulariser's gradient is 0, not NaN.

Shapes: four lists of tensors of pairwise equal shapes, `distance` () and `hyper` (5,) = [lr, mu, alpha, beta n, gamma].
Dtypes: weights and gradients fp32, fp16 or bf16, the buffers m and v fp32 (the reference also takes fp64);
`distance` and `hyper` any floating dtype. The distance belongs to the weights as stored, rounded to their dtype.
Source: Krishnan, Xiao, Saurous 2018, arXiv 1712.03298, Algorithm 2 lines 9-12 and equation 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.backend import UnsupportedInputError, use_reference, wrap_triton

DISTANCE_FLOOR = 1e-8


def neumann_update_reference(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    distance: Tensor,
    hyper: Tensor,
) -> None:
    """The update in torch._foreach_* calls, in place, without a host synchronisation."""
    if not params:
        distance.zero_()
        return
    # a 0-dim tensor of the list's dtype makes a foreach call on a CPU three times as fast as a Python scalar
    lr, mu, alpha, beta_n, gamma = hyper.to(exp_avgs[0].dtype).unbind()
    pull = alpha * distance - beta_n / distance.clamp_min(DISTANCE_FLOOR) ** 3

    move = torch._foreach_sub(params, exp_avgs)
    torch._foreach_mul_(move, -lr * pull)
    torch._foreach_addcmul_(move, grads, [-lr] * len(grads))  # -lr d
    torch._foreach_mul_(momentum_buffers, mu)
    torch._foreach_add_(momentum_buffers, move)
    torch._foreach_addcmul_(move, momentum_buffers, [mu] * len(params))
    torch._foreach_add_(params, move)
    torch._foreach_sub_(exp_avgs, params)
    torch._foreach_mul_(exp_avgs, gamma)  # new v - new w
    distance.copy_(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(exp_avgs))))
    torch._foreach_add_(exp_avgs, params)


@dataclass(frozen=True)
class NeumannConfig:
    """A program updates BLOCK elements in memory order."""

    BLOCK: int = 1024
    num_warps: int = 4


CONFIGS: list[NeumannConfig] = [NeumannConfig(block, warps) for block in (512, 1024, 2048, 4096) for warps in (2, 4, 8)]
FINISH_BLOCK = 1024


def prune(configs: Sequence[NeumannConfig], numel: int) -> list[NeumannConfig]:
    """Configs worth a measurement for `numel` elements: 4 to 16 elements a thread, programs at most twice too large."""
    most = max(configs[0].BLOCK, 2 * numel)
    return [c for c in configs if most >= c.BLOCK and 4 <= c.BLOCK // (32 * c.num_warps) <= 16]


@triton.jit(do_not_specialize=["first_partial"])
def _update_kernel(
    # tensors of `numel` elements in one memory order
    param_ptr,
    momentum_ptr,
    exp_avg_ptr,
    grad_ptr,
    # (), (5,) and one partial sum a program
    distance_ptr,
    hyper_ptr,
    partial_ptr,
    # sizes
    numel,
    first_partial,
    DISTANCE_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel

    distance = tl.load(distance_ptr).to(tl.float32)
    lr = tl.load(hyper_ptr).to(tl.float32)
    mu = tl.load(hyper_ptr + 1).to(tl.float32)
    alpha = tl.load(hyper_ptr + 2).to(tl.float32)
    beta_n = tl.load(hyper_ptr + 3).to(tl.float32)
    gamma = tl.load(hyper_ptr + 4).to(tl.float32)
    floored = tl.maximum(distance, DISTANCE_FLOOR)
    pull = alpha * distance - beta_n / (floored * floored * floored)

    param = tl.load(param_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    momentum = tl.load(momentum_ptr + offs, mask=mask, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)

    move = lr * (grad + pull * (param - exp_avg))
    momentum = mu * momentum - move
    stored = (param + (mu * momentum - move)).to(param_ptr.dtype.element_ty)
    gap = tl.where(mask, stored.to(tl.float32) - exp_avg, 0.0)

    tl.store(momentum_ptr + offs, momentum, mask=mask)
    tl.store(param_ptr + offs, stored, mask=mask)
    tl.store(exp_avg_ptr + offs, exp_avg + (1.0 - gamma) * gap, mask=mask)
    tl.store(partial_ptr + first_partial + pid, gamma * gamma * tl.sum(gap * gap))


@triton.jit
def _finish_kernel(partial_ptr, distance_ptr, num_partials, BLOCK: tl.constexpr):
    # distance = sqrt(sum of partials), by one program in a fixed order
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_partials, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + offs, mask=offs < num_partials, other=0.0)
    tl.store(distance_ptr, tl.sqrt(tl.sum(sums)))


def supports(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> bool:
    """Whether the Triton launcher takes these dtypes; the reference takes the others (fp64)."""
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return all(t.dtype in narrow for t in (*params, *grads)) and all(
        t.dtype == torch.float32 for t in (*momentum_buffers, *exp_avgs)
    )


def launch_neumann_update_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    distance: Tensor,
    hyper: Tensor,
    config: NeumannConfig | None = None,
) -> None:
    """`neumann_update_` in Triton: one launch a tensor, one to finish the norm; any strides.

    Tensors that don't share one dense memory order are copied to the parameter's order and back.

    Raises:
        UnsupportedInputError: a dtype that `supports` refuses, or shapes that differ.

    """
    _check(params, momentum_buffers, exp_avgs, grads, distance, hyper)
    if not supports(params, momentum_buffers, exp_avgs, grads):
        raise UnsupportedInputError(
            "expected fp32, fp16 or bf16 params and grads and fp32 buffers, got "
            f"{sorted({str(t.dtype) for t in (*params, *grads)})} and "
            f"{sorted({str(t.dtype) for t in (*momentum_buffers, *exp_avgs)})}"
        )
    for place, tensors in enumerate(zip(params, momentum_buffers, exp_avgs, grads, strict=True)):
        if len({t.shape for t in tensors}) > 1:
            raise UnsupportedInputError(
                f"expected tensors of one shape at place {place}, got {', '.join(str(tuple(t.shape)) for t in tensors)}"
            )
    chosen = config or NeumannConfig()
    programs = [triton.cdiv(p.numel(), chosen.BLOCK) for p in params]
    if sum(programs) == 0:
        distance.zero_()
        return
    partials = torch.empty(sum(programs), dtype=torch.float32, device=distance.device)
    update, finish = wrap_triton(_update_kernel), wrap_triton(_finish_kernel)
    first = 0
    for param, momentum, exp_avg, grad, count in zip(params, momentum_buffers, exp_avgs, grads, programs, strict=True):
        if count == 0:
            continue
        order = sorted(range(param.dim()), key=param.stride, reverse=True)
        views = [t.permute(order) for t in (param, momentum, exp_avg, grad)]
        dense = [t.contiguous() for t in views]
        update[(count,)](
            *dense,
            distance,
            hyper,
            partials,
            param.numel(),
            first,
            DISTANCE_FLOOR=DISTANCE_FLOOR,
            BLOCK=chosen.BLOCK,
            num_warps=chosen.num_warps,
        )
        for view, copy in zip(views[:3], dense[:3], strict=True):
            if copy is not view:
                view.copy_(copy)
        first += count
    finish[(1,)](partials, distance, first, BLOCK=FINISH_BLOCK, num_warps=4)


def _check(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    distance: Tensor,
    hyper: Tensor,
) -> None:
    if not len(params) == len(momentum_buffers) == len(exp_avgs) == len(grads):
        raise UnsupportedInputError(
            f"expected lists of one length, got {len(params)} params, {len(momentum_buffers)} momentum_buffers, "
            f"{len(exp_avgs)} exp_avgs, {len(grads)} grads"
        )
    if hyper.shape != (5,) or distance.dim() != 0:
        raise UnsupportedInputError(
            "expected distance () and hyper (5,) = [lr, mu, alpha, beta n, gamma], got "
            f"{tuple(distance.shape)} and {tuple(hyper.shape)}"
        )


@triton_op("triton_curv::neumann_update_", mutates_args={"params", "momentum_buffers", "exp_avgs", "distance"})
def _neumann_update_op(
    params: list[Tensor],
    momentum_buffers: list[Tensor],
    exp_avgs: list[Tensor],
    grads: list[Tensor],
    distance: Tensor,
    hyper: Tensor,
) -> None:
    lists = (params, momentum_buffers, exp_avgs, grads)
    if use_reference(distance) or not supports(*lists):
        _check(*lists, distance, hyper)
        neumann_update_reference(*lists, distance, hyper)
    else:
        launch_neumann_update_(*lists, distance, hyper)


def neumann_update_(
    params: list[Tensor],
    momentum_buffers: list[Tensor],
    exp_avgs: list[Tensor],
    grads: list[Tensor],
    distance: Tensor,
    hyper: Tensor,
) -> None:
    """`m.mul_(mu).sub_(lr * d); w.add_(mu * m - lr * d); v.lerp_(w, 1 - gamma)` with the regularised gradient d.

    Args:
        params: displaced weights w, changed in place; any strides; call it under `torch.no_grad()`.
        momentum_buffers: Neumann iterates m, changed in place; fp32 (fp64 with fp64 params).
        exp_avgs: moving averages v of the weights, changed in place; as `momentum_buffers`. They must not share memory
            with `params`: w - v would be 0 for ever.
        grads: gradients at w.
        distance: D = ||w - v||_2 over the whole parameter vector, shape (); overwritten by the new ||w - v||_2 over
            the tensors of this call.
        hyper: (5,) = [lr, mu, alpha, beta * n, gamma], on the tensors' device.

    Raises:
        UnsupportedInputError: lists of unequal lengths, or `hyper` or `distance` of another shape.

    """
    if not torch.compiler.is_compiling() and use_reference(distance):
        _check(params, momentum_buffers, exp_avgs, grads, distance, hyper)
        neumann_update_reference(params, momentum_buffers, exp_avgs, grads, distance, hyper)
    else:
        torch.ops.triton_curv.neumann_update_(params, momentum_buffers, exp_avgs, grads, distance, hyper)
