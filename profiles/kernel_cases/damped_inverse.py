"""`damped_inverse_` on the factors of real nets, against Cholesky bank by bank."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from profiles.kernel_cases.case import Case
from profiles.kernel_cases.shapes import FactorShape, gpt2_factors, resnet50_factors
from triton_curv_kernels.damped_inverse import damped_inverse_

COLD_STEPS = 8  # enough for condition numbers to 1e4, which RELATIVE_DAMPING keeps
WARM_STEPS = 3
RELATIVE_DAMPING = 0.1  # of the mean eigenvalue
CHANGE = 0.05  # part of the average that is new since the last inverse
BAR = "a refresh from warm starts faster than Cholesky and inverse, bank by bank, on an H200"


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Whole nets, from warm and from cold starts; on CPU two banks of a small net."""
    if device.type != "cuda":
        for start in ("warm", "cold"):
            yield _case("16 x 64, 4 x 145", [(16, 64), (4, 145)], device, start)
        return
    resnet = _banks(resnet50_factors(32))
    yield _case("ResNet-50", resnet, device, "warm", BAR)
    if not quick:
        yield _case("ResNet-50", resnet, device, "cold")
        yield _case("GPT-2 124M", _banks(gpt2_factors()), device, "warm", BAR)


def _banks(factors: Sequence[FactorShape]) -> list[tuple[int, int]]:
    """(batch, n) for each size that occurs."""
    sizes = [factor.n + factor.ones for factor in factors]
    return [(sizes.count(n), n) for n in sorted(set(sizes))]


def _case(name: str, banks: Sequence[tuple[int, int]], device: torch.device, start: str, bar: str = "") -> Case:
    torch.manual_seed(0)
    factors, shifts, starts = [], [], []
    for batch, n in banks:
        decay = torch.logspace(0, -3, n, device=device)
        old, new = (_samples(batch, n, decay, device) for _ in range(2))
        factor = torch.lerp(old, new, CHANGE)
        shift = RELATIVE_DAMPING * factor.diagonal(dim1=-2, dim2=-1).mean(-1)
        factors.append(factor)
        shifts.append(shift)
        starts.append(_cholesky(old, shift) if start == "warm" else torch.zeros_like(factor))
    inverses = [x.clone() for x in starts]
    steps = WARM_STEPS if start == "warm" else COLD_STEPS

    def ours() -> Tensor:
        torch._foreach_copy_(inverses, starts)  # or the second call would find the inverses
        return damped_inverse_(inverses, factors, shifts, steps, 3)

    def error(results: Sequence[Tensor]) -> float:
        """Of the first matrix of each bank, against float64."""
        worst = 0.0
        for x, factor, shift in zip(results, factors, shifts, strict=True):
            oracle = torch.linalg.inv(factor[0].double() + shift[0].double() * _identity(factor).double())
            worst = max(worst, float((x[0].double() - oracle).abs().max() / oracle.abs().max()))
        return worst

    def our_error() -> float:
        ours()
        return error(inverses)

    def by_cholesky() -> list[Tensor]:
        return [_cholesky(factor, shift) for factor, shift in zip(factors, shifts, strict=True)]

    def by_inv() -> list[Tensor]:
        pairs = zip(factors, shifts, strict=True)
        return [torch.linalg.inv(factor + shift[:, None, None] * _identity(factor)) for factor, shift in pairs]

    cubes = sum(float(batch) * n**3 for batch, n in banks)
    return Case(
        op="damped_inverse_",
        name=f"{name}, {start} start, {steps} steps",
        ours=ours,
        alternatives={
            "cholesky_ex + cholesky_inverse": by_cholesky,
            "linalg.inv": by_inv,
        },
        error=our_error,
        allowed_error=lambda: 2 * error(by_cholesky()),
        flops=(4 * steps + 2) * cubes,  # a step: one whole product, two triangles; and the last residual
        bytes=sum(4.0 * batch * n * n for batch, n in banks) * 3,
        bound="fp32",
        bar=bar,
        eager=("cholesky_ex + cholesky_inverse", "linalg.inv"),
    )


def _samples(batch: int, n: int, decay: Tensor, device: torch.device) -> Tensor:
    """Second moments of 2 n samples each, with eigenvalues from 1 to 1e-3."""
    x = torch.randn(batch, 2 * n, n, device=device) * decay.sqrt()
    return x.mT @ x / (2 * n)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _cholesky(factor: Tensor, shift: Tensor) -> Tensor:
    lower, _ = torch.linalg.cholesky_ex(factor + shift[:, None, None] * _identity(factor))
    return torch.cholesky_inverse(lower)
