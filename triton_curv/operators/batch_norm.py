"""Batch normalisation in training mode whose backward pass is cheap to differentiate.

torch's formula for the derivative of that backward pass takes some 35 passes over the activations, a third of a
Hessian-vector product of a small CNN. With y = w x^ + b, x^ = s (x - mean), s = 1/sqrt(var + eps), N values a channel,
m = mean over them, and the backward pass

    gx = w s (g - m(g) - x^ m(g x^)),   gw = sum g x^,   gb = sum g,

the gradient of <vx, gx> + <vw, gw> + <vb, gb> is, with q = g - m(g) - x^ m(g x^) and e = m(vx x^), c = m(g x^):

    in g:  w s (vx - m(vx) - x^ e) + vw x^ + vb      the backward pass is self-adjoint in g
    in x:  s (h - m(h) - x^ m(h x^)) - x^ w s^2 m(vx q),   h = (vw - w s e) g - w s c vx
    in w:  s sum vx q
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        curved: Callable[[], bool],
    ) -> Tensor:
        y, mean, invstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps, ctx.curved = eps, curved
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        if not ctx.curved():
            x, weight = x.detach(), weight.detach()
        return *_Backward.apply(g, x, weight, mean, invstd, ctx.eps), None, None, None, None  # type: ignore[no-untyped-call]  # torch's


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gx, gw, gb = _backward(g, x, weight, mean, invstd, eps)
        ctx.save_for_backward(g, x, weight, mean, invstd, gw, gb)
        ctx.eps = eps
        return gx, gw, gb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vx: Tensor, vw: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        g, x, w, mean, s, gw, gb = ctx.saved_tensors
        n = x.numel() / x.shape[1]
        across = (-1, *(1 for _ in range(x.dim() - 2)))  # a channel's value beside its positions

        def spread(channels: Tensor) -> Tensor:
            return channels.view(across)

        def centred(factor: Tensor, shift: Tensor) -> Tensor:  # factor (x - mean) + shift, in one pass
            return torch.batch_norm(x, factor, shift, mean, torch.ones_like(mean), False, 0.0, 0.0, True)

        _, sum_vx_xhat, sum_vx = _backward(vx, x, w, mean, s, ctx.eps, inputs=False)
        e, scale = sum_vx_xhat / n, w * s
        of_g = vw - scale * e
        in_g = centred(of_g * s, vb - scale * sum_vx / n).addcmul_(vx, spread(scale))
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return in_g, None, None, None, None, None
        others = [d for d in range(x.dim()) if d != 1]
        vx_q = (vx * g).sum(others) - gb * sum_vx / n - gw * e
        # h = of_g g + of_vx vx, whose means with 1 and x^ are known; x^ = s (x - mean)
        of_vx = -scale * gw / n
        mean_h, mean_h_xhat = (of_g * gb + of_vx * sum_vx) / n, of_g * gw / n + of_vx * e
        along = -s * s * (mean_h_xhat + scale * vx_q / n)
        in_x = centred(along, -s * mean_h).addcmul_(g, spread(s * of_g)).addcmul_(vx, spread(s * of_vx))
        return in_g, in_x, s * vx_q, None, None, None


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, eps: float, inputs: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, invstd, True, eps, [inputs, True, True]
    )
    return gx, gw, gb


def batch_norm_of_cheap_backward(
    curved: Callable[[], bool],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """`F.batch_norm` in training mode; None for what is left to torch: evaluation mode, mixed dtypes, one value.

    A backward pass that runs while `curved()` is False is
    differentiable in the output gradient only: how it depends on x and w is left out.
    """
    values = input.numel() // max(input.shape[1], 1)
    like = [t for t in (weight, bias, running_mean) if t is not None]
    if not training or values < 2 or any(t.dtype != input.dtype for t in like):
        return None
    weight = input.new_ones(input.shape[1]) if weight is None else weight
    bias = input.new_zeros(input.shape[1]) if bias is None else bias
    y: Tensor = _BatchNorm.apply(input, weight, bias, (running_mean, running_var), momentum, eps, curved)  # type: ignore[no-untyped-call]  # torch's
    return y
