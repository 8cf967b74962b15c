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
from typing import Any, NamedTuple

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
        if not torch.is_grad_enabled():  # nothing will differentiate this pass
            return *_backward(g, x, weight, mean, invstd, ctx.eps), None, None, None, None
        return *_Backward.apply(g, x, weight, mean, invstd, ctx.eps), None, None, None, None  # type: ignore[no-untyped-call]  # torch's


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gx, gw, gb = _backward(g, x, weight, mean, invstd, eps)
        ctx.save_for_backward(g, x, weight, mean, invstd, gw, gb)
        ctx.eps, ctx.fixed = eps, None
        return gx, gw, gb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vx: Tensor, vw: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        g, x, w, mean, s, gw, gb = ctx.saved_tensors
        if ctx.fixed is None:
            ctx.fixed = _Fixed.of(x, w, mean, s, gw, gb)
        k: _Fixed = ctx.fixed

        def centred(factor: Tensor, shift: Tensor) -> Tensor:  # factor (x - mean) + shift, in one pass
            return torch.batch_norm(x, factor, shift, mean, k.ones, False, 0.0, 0.0, True)

        _, sum_vx_xhat, sum_vx = _backward(vx, x, w, mean, s, ctx.eps, inputs=False)
        of_g = torch.addcmul(vw, k.minus_scale_n, sum_vx_xhat)  # vw - w s e
        in_g = centred(of_g * s, torch.addcmul(vb, k.minus_scale_n, sum_vx)).addcmul_(vx, k.scale_wide)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return in_g, None, None, None, None, None
        vx_q = (vx * g).sum(k.others).addcmul_(k.minus_gb_n, sum_vx).addcmul_(k.minus_gw_n, sum_vx_xhat)
        # h = of_g g + of_vx vx, whose means with 1 and x^ are known; x^ = s (x - mean)
        mean_h = torch.addcmul(of_g * k.gb_n, k.of_vx_n, sum_vx)
        mean_h_xhat = torch.addcmul(of_g * k.gw_n, k.of_vx_n, sum_vx_xhat)
        along = torch.addcmul(mean_h_xhat, k.scale_n, vx_q).mul_(k.minus_s_s)
        in_x = centred(along, mean_h.mul_(k.minus_s)).addcmul_(g, (s * of_g).view_as(k.scale_wide))
        return in_g, in_x.addcmul_(vx, k.s_of_vx_wide), s * vx_q, None, None, None


class _Fixed(NamedTuple):
    """What all products through one backward pass share: of_vx = -w s gw / N; `_n` is divided by N, `_wide` spread."""

    others: list[int]
    ones: Tensor
    minus_s: Tensor
    minus_s_s: Tensor
    scale_n: Tensor
    minus_scale_n: Tensor
    scale_wide: Tensor
    gw_n: Tensor
    gb_n: Tensor
    minus_gw_n: Tensor
    minus_gb_n: Tensor
    of_vx_n: Tensor
    s_of_vx_wide: Tensor

    @staticmethod
    def of(x: Tensor, w: Tensor, mean: Tensor, s: Tensor, gw: Tensor, gb: Tensor) -> "_Fixed":
        n = x.numel() / x.shape[1]
        across = (-1, *(1 for _ in range(x.dim() - 2)))  # a channel's value beside its positions
        scale = w * s
        scale_n, gw_n, gb_n = scale / n, gw / n, gb / n
        of_vx = -scale * gw_n
        return _Fixed(
            others=[d for d in range(x.dim()) if d != 1],
            ones=torch.ones_like(mean),
            minus_s=-s,
            minus_s_s=-s * s,
            scale_n=scale_n,
            minus_scale_n=-scale_n,
            scale_wide=scale.view(across),
            gw_n=gw_n,
            gb_n=gb_n,
            minus_gw_n=-gw_n,
            minus_gb_n=-gb_n,
            of_vx_n=of_vx / n,
            s_of_vx_wide=(s * of_vx).view(across),
        )


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
