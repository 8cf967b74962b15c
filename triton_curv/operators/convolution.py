"""Convolution whose backward pass is cheap to differentiate.

The backward pass is gx = conv^T(g, w), gw = corr(x, g), gb = sum g; the gradient of <vx, gx> + <vw, gw> + <vb, gb> is

    in g:  conv(vx, w) + conv(x, vw) + vb
    in x:  conv^T(g, vw)        the backward pass itself, at (vx, vw) instead of (x, w)
    in w:  corr(vx, g)

torch's own formula always computes all three, which is three to four times the work that a Gauss-Newton product has
use for: that asks for the first line only.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Geometry(NamedTuple):
    """Arguments of a convolution, one number for each spatial dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry) -> Tensor:
    no_output_padding = [0] * len(how.stride)
    y: Tensor = torch.ops.aten.convolution(
        x, weight, bias, how.stride, how.padding, how.dilation, False, no_output_padding, how.groups
    )
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry, curved: Callable[[], bool]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.curved = how, curved
        return _convolve(x, weight, bias, how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if not ctx.curved():
            x, weight = x.detach(), weight.detach()
        if not torch.is_grad_enabled():  # nothing will differentiate this pass
            return *_backward(g, x, weight, ctx.how, ctx.needs_input_grad[:3]), None, None
        return *_Backward.apply(g, x, weight, ctx.how, ctx.needs_input_grad[:3]), None, None  # type: ignore[no-untyped-call]  # torch's


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, how: Geometry, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return _backward(g, x, weight, how, needed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        in_g: Tensor | None = None
        if vw is not None:
            in_g = _convolve(x, vw, vb, ctx.how)
        if vx is not None:
            part = _convolve(vx, weight, vb if vw is None else None, ctx.how)
            in_g = part if in_g is None else in_g.add_(part)
        if in_g is None and vb is not None:
            in_g = _convolve(x, torch.zeros_like(weight), vb, ctx.how)
        needed = [ctx.needs_input_grad[1] and vw is not None, ctx.needs_input_grad[2] and vx is not None, False]
        in_x, in_w = None, None
        if any(needed):  # what is None is not looked at
            in_x, in_w, _ = _backward(g, x if vx is None else vx, weight if vw is None else vw, ctx.how, needed)
        return in_g, in_x, in_w, None, None


def _backward(g: Tensor, x: Tensor, weight: Tensor, how: Geometry, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Those of gx, gw, gb that are needed, None for the others."""
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        g,
        x,
        weight,
        [weight.shape[0]],
        how.stride,
        how.padding,
        how.dilation,
        False,
        [0] * len(how.stride),
        how.groups,
        list(needed),
    )
    return tuple(t if wanted else None for t, wanted in zip(found, needed, strict=True))


def convolution_of_cheap_backward(
    curved: Callable[[], bool],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """`F.conv1d`, `F.conv2d` or `F.conv3d`, by the weight's dimensions; None for what is left to torch.

    That is unbatched input, padding by name, mixed dtypes. A backward pass that runs while `curved()` is False is
    differentiable in the output gradient only: how it depends on x and w is left out.
    """
    dims = weight.dim() - 2
    if input.dim() != weight.dim() or isinstance(padding, str) or input.dtype != weight.dtype:
        return None

    def each(value: int | Sequence[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    how = Geometry(each(stride), each(padding), each(dilation), groups)
    y: Tensor = _Convolution.apply(input, weight, bias, how, curved)  # type: ignore[no-untyped-call]  # torch's
    return y
