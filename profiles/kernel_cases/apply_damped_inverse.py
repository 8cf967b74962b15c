"""`apply_damped_inverse` on the layers of real nets, against a loop of matrix products."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from profiles.kernel_cases.case import Case
from profiles.kernel_cases.shapes import gpt2_linears, resnet50_convs, resnet50_linears
from triton_curv_kernels.apply_inverse import apply_damped_inverse

BAR = "at most 1.2 times the roofline sum and 3 launches on an H200"
DIGITS_CNN = [(16, 10), (32, 145), (64, 289), (10, 257)]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Whole nets; on CPU a small one, whose norm layers have 2 x 2 blocks."""
    if device.type != "cuda":
        yield _case("digits-cnn", DIGITS_CNN, [16, 32, 64], torch.float32, device)
        return
    resnet = [(conv.out_channels, conv.patch) for conv in resnet50_convs(32)]
    resnet += [(linear.out_features, linear.in_features + linear.bias) for linear in resnet50_linears(32)]
    norms = [conv.out_channels for conv in resnet50_convs(32)]
    yield _case("ResNet-50", resnet, norms, torch.float32, device, BAR)
    if quick:
        return
    yield _case("ResNet-50", resnet, norms, torch.bfloat16, device, BAR)
    gpt2 = [(linear.out_features, linear.in_features + linear.bias) for linear in gpt2_linears()]
    yield _case("GPT-2 124M", gpt2, [], torch.float32, device)


def _case(
    name: str,
    shapes: Sequence[tuple[int, int]],
    norms: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    bar: str = "",
) -> Case:
    """Layers (r, c) with two factors, and norm layers of so many channels with a block of 2 x 2 for each."""
    torch.manual_seed(0)
    empty = partial(torch.empty, dtype=dtype, device=device)
    grads = [torch.randn(shape, device=device).to(dtype) for shape in (*shapes, *((n, 2, 1) for n in norms))]
    updates = [torch.empty_like(grad) for grad in grads]
    of_a = [_positive(c, dtype, device) for _, c in shapes] + [empty(0) for _ in norms]
    of_g = [_positive(r, dtype, device) for r, _ in shapes]
    of_g += [_positive(2, dtype, device).repeat(n, 1, 1) for n in norms]
    kl_clip, lr = (torch.full((), value, device=device) for value in (1e-3, 0.1))

    def ours() -> object:
        return apply_damped_inverse(updates, grads, of_a, of_g, kl_clip, lr)

    def loop() -> Tensor:
        """What KFAC would do without the op: products, then norms and the sum that KL clipping needs."""
        for update, grad, a, g in zip(updates, grads, of_a, of_g, strict=True):
            if a.numel() == 0:
                torch.matmul(g, grad, out=update)
            else:
                torch.matmul(g @ grad, a, out=update)
        norms_of = torch.stack(torch._foreach_norm(updates))
        products = torch.stack([torch.dot(u.view(-1), d.view(-1)) for u, d in zip(updates, grads, strict=True)])
        clip = torch.sqrt(kl_clip / (products.sum() * lr**2).clamp_min(1e-30)).clamp_max(1.0)
        scaled: Tensor = norms_of * clip
        return scaled

    def error() -> float:
        """Of P, the largest over the layers, relative to each layer's largest number."""
        worst = 0.0
        for update, grad, a, g in zip(updates, grads, of_a, of_g, strict=True):
            oracle = g.double() @ grad.double()
            oracle = oracle if a.numel() == 0 else oracle @ a.double()
            worst = max(worst, float((update.double() - oracle).abs().max() / oracle.abs().max()))
        return worst

    def error_of(apply: object) -> float:
        assert callable(apply)
        apply()
        return error()

    return Case(
        op="apply_damped_inverse",
        name=f"{name} {str(dtype).removeprefix('torch.')}",
        ours=ours,
        alternatives={"loop of matmul, norms, dots": loop},
        error=lambda: error_of(ours),
        allowed_error=lambda: 2 * error_of(loop),
        flops=sum(2.0 * r * c * (r + c) for r, c in shapes) + sum(8.0 * n for n in norms),
        bytes=float(sum(t.numel() * t.itemsize for ts in (updates, grads, of_a, of_g) for t in ts)),
        bound="fp32" if dtype == torch.float32 else "tensor",
        bar=bar,
    )


def _positive(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A symmetric matrix, as an inverse would be."""
    x = torch.randn(n, n, device=device) / n**0.5
    positive: Tensor = x @ x.mT + torch.eye(n, device=device)
    return positive.to(dtype)
