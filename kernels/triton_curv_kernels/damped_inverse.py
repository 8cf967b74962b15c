# mypy: ignore-errors
# (Triton's launches are untyped)
"""X <- (F + s I)^-1 for many symmetric F at once, by hyperpower steps that start from the X of the last time.

Shapes: lists over banks; inverses and factors (b, n, n), shifts (b,), any n. Dtype: fp32; by the reference fp64, too.

With A = F + s I and R = I - A X, a step of order 2 or 3 is (Altman 1960; Schulz 1933 for order 2)

    X <- X + X R                R <- R^2
    X <- X + X R + X R R        R <- R^3

X R and X R R are symmetric even where X and A do not commute, A X is not: R is a whole product, the others take one
triangle. A step squares or cubes ||R||_F once that is below 1, whatever the rounding of the last step.

Cold start: X = 2 / (l + u) I, where u >= lambda_max is the largest absolute row sum of A and l <= lambda_min the larger
of s and Gershgorin's bound. The spectrum of R then lies in [-rho, rho], rho = (u - l) / (u + l), and the polynomial in
R of least maximum there is Chebyshev's, T_k(R / rho) / T_k(1 / rho). It takes the same products as a plain step:

    order 2:  X <- a (X + X R)              a = 2 / (2 - rho^2)       rho <- 1 / T_2(1 / rho)
    order 3:  X <- X + a (X R + X R R)      a = 4 / (4 - 3 rho^2)     rho <- 1 / T_3(1 / rho)

so that small eigenvalues of A X grow by 4 and 9 a step in place of 2 and 3. Steps are plain again once ||R||_F < 1.

Which start a matrix takes is decided on the device, at every step: a warm one goes on while ||R||_F < 1 (it converges,
this is a proof) or has halved (X = 0, of residual sqrt(n), counts as the step before the first), else X starts cold. A
matrix is left alone once ||R||_F is at rounding level or stops falling, or a cold start diverges. What comes back is
||R||_F of the X that is returned, measured, not predicted; NaN or Inf in F give NaN or Inf.

R is added up in fp64 (see `DampedInverseConfig`), which makes X more accurate than Cholesky in fp32. Relative error of
X against float64, with eigenvalues log-spaced from 1 to 1 / kappa, n = 128, and the steps that reach it; "warm" is the
inverse before 5 % of F were replaced, which from kappa = 1e5 on is too far away in ||R||_F and starts cold
(`python -m profiles.bench_damped_inverse` makes the table anew):

    kappa  Cholesky  here   ||R||_F  order 2: cold  warm  order 3: cold  warm
    1e1    3e-7      6e-8   6e-7              6     3              4     2
    1e2    1e-6      5e-7   3e-6              8     3              5     2
    1e3    1e-5      3e-6   2e-5              9     3              6     2
    1e4    7e-5      2e-5   2e-4              11    3              7     2
    1e5    7e-4      6e-5   1e-3              12                   8
    1e6    4e-3      3e-4   1e-2              13                   8
    1e7    3e-2      7e-3   1e-1              14                   10
    1e8    5e-1      4e-2   1                 19                   11
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.backend import (
    UnsupportedInputError,
    device_limits,
    is_traced,
    on_own_device,
    use_reference,
    wrap_triton,
)
from triton_curv_kernels.choice import choose_once, tables_key
from triton_curv_kernels.damped_inverse_config import (
    CONFIGS,
    NUMERICS,
    SMALL,
    DampedInverseConfig,
    DampedInverseProblem,
    default_config,
    prune,
)
from triton_curv_kernels.damped_inverse_kernels import (
    bounds_kernel,
    correction_kernel,
    decide_kernel,
    residual_kernel,
    start_kernel,
    update_kernel,
)
from triton_curv_kernels.damped_inverse_reference import BOUND_SLACK, TOLERANCE, damped_inverse_reference
from triton_curv_kernels.damped_inverse_work import lay_out, make_work

__all__ = [
    # the op, its reference and its launcher
    "damped_inverse_",
    "damped_inverse_reference",
    "launch_damped_inverse_",
    "supports",
    # its configurations
    "CONFIGS",
    "NUMERICS",
    "DampedInverseConfig",
    "DampedInverseProblem",
    "default_config",
    "prune",
]


def supports(inverses: Sequence[Tensor], factors: Sequence[Tensor], shifts: Sequence[Tensor]) -> bool:
    """Whether the Triton path takes these dtypes: fp32. For others, fp64 say, the op takes the reference."""
    return all(t.dtype == torch.float32 for t in (*inverses, *factors, *shifts))


@on_own_device
def launch_damped_inverse_(
    inverses: Sequence[Tensor],
    factors: Sequence[Tensor],
    shifts: Sequence[Tensor],
    iterations: int = 8,
    order: int = 3,
    config: DampedInverseConfig | None = None,
) -> Tensor:
    """`damped_inverse_` by Triton, whatever the device.

    Four launches a step (residual, decision, two products), whatever the number of matrices, and four around them.
    Matrices of up to 32 x 32 are launched apart, unless there is a `config`. No host sync.
    """
    _check(inverses, factors, shifts, iterations, order)
    if not supports(inverses, factors, shifts):
        found = sorted({str(t.dtype) for t in (*inverses, *factors, *shifts)})
        raise UnsupportedInputError(f"expected fp32 tensors, got {found}")
    if not factors:
        return torch.empty(0)
    all_shifts = torch.cat(list(shifts))
    residuals = torch.zeros_like(all_shifts)
    places = list(accumulate((len(f) for f in factors), initial=0))
    classes: dict[bool, list[int]] = {}
    for index, factor in enumerate(factors):
        if factor.numel() > 0:
            classes.setdefault(config is None and factor.shape[-1] <= SMALL, []).append(index)
    for members in classes.values():
        chosen = config or _chosen([factors[i] for i in members])
        own = [[tensors[i] for i in members] for tensors in (inverses, factors)]
        _iterate(*own, [places[i] for i in members], all_shifts, residuals, iterations, order, chosen)
    return residuals


def _chosen(factors: Sequence[Tensor]) -> DampedInverseConfig:
    device, shapes = factors[0].device, tuple((len(f), f.shape[-1]) for f in factors)
    return choose_once(
        "damped_inverse_",
        (shapes, device),
        lambda: DampedInverseProblem.of(shapes, device_limits(device)),
        default_config,
    )


def _iterate(
    inverses: list[Tensor],
    factors: list[Tensor],
    places: list[int],
    shifts: Tensor,
    residuals: Tensor,
    iterations: int,
    order: int,
    config: DampedInverseConfig,
) -> None:
    """All launches for the banks of one class: into workspaces, steps, and back."""
    block_m, block_n, block_k = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    if block_n % block_m or block_n % block_k:
        raise UnsupportedInputError(f"expected BLOCK_M and BLOCK_K that divide BLOCK_N, got {config}")
    device = shifts.device
    shapes = [(len(f), f.shape[-1]) for f in factors]
    banks, length = lay_out(shapes, block_n)
    matrices, tiles, triangle, panels = make_work(shapes, places, block_n, block_m, device, traced=is_traced(shifts))
    inverse, damped = (torch.zeros(length, dtype=torch.float32, device=device) for _ in range(2))
    left, correction = (torch.empty(length, dtype=torch.float32, device=device) for _ in range(2))
    inside, damped_inside = ([bank.view(memory) for bank in banks] for memory in (inverse, damped))
    torch._foreach_copy_(inside, inverses)
    torch._foreach_add_(inside, [x.mT for x in inverses])
    torch._foreach_mul_(inside, 0.5)
    torch._foreach_copy_(damped_inside, factors)
    for a, place in zip(damped_inside, places, strict=True):
        a.diagonal(dim1=-2, dim2=-1).add_(shifts.narrow(0, place, len(a)).unsqueeze(1))

    count = len(matrices)
    modes = torch.empty(count, dtype=torch.int32, device=device)
    state = torch.empty((5, count), dtype=torch.float32, device=device)
    partials = torch.empty(len(tiles), dtype=torch.float32, device=device)
    bounds = torch.empty((len(panels), 2), dtype=torch.float32, device=device)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    products = {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": config.num_warps, "num_stages": config.num_stages}
    tolerance = TOLERANCE * torch.finfo(torch.float32).eps

    def measure(last: bool) -> None:
        wrap_triton(residual_kernel)[(len(tiles),)](
            *(matrices, tiles, modes, inverse, damped, left, partials),
            **products,
            BLOCK_M=block_m,
            PRECISION=config.residual_precision,
        )
        wrap_triton(decide_kernel)[(count,)](
            *(matrices, modes, partials, state, residuals, count),
            **blocks,
            ORDER=order,
            LAST=last,
            TOLERANCE=tolerance,
            BLOCK=1024,
        )

    wrap_triton(bounds_kernel)[(len(panels),)](matrices, panels, damped, bounds, BLOCK_N=block_n)
    wrap_triton(start_kernel)[(count,)](
        *(matrices, bounds, shifts, modes, state, count), SLACK=BOUND_SLACK, BLOCK_N=block_n, num_warps=1
    )
    control = (matrices, triangle, modes, state, count)
    for _ in range(iterations):
        measure(last=False)
        wrap_triton(correction_kernel)[(len(triangle),)](
            *control, inverse, damped, left, correction, **products, PRECISION=config.input_precision
        )
        wrap_triton(update_kernel)[(len(triangle),)](
            *control, inverse, left, correction, **products, ORDER=order, PRECISION=config.input_precision
        )
    measure(last=True)
    torch._foreach_copy_(inverses, inside)


def _check(
    inverses: Sequence[Tensor], factors: Sequence[Tensor], shifts: Sequence[Tensor], iterations: int, order: int
) -> None:
    if not len(inverses) == len(factors) == len(shifts):
        raise UnsupportedInputError(
            f"expected lists of one length, got {len(inverses)} inverses, {len(factors)} factors, {len(shifts)} shifts"
        )
    if order not in (2, 3) or iterations < 0:
        raise UnsupportedInputError(f"expected order 2 or 3 and iterations >= 0, got {order=}, {iterations=}")
    for index, (x, f, s) in enumerate(zip(inverses, factors, shifts, strict=True)):
        if f.dim() != 3 or f.shape[1] != f.shape[2] or x.shape != f.shape or s.shape != f.shape[:1]:
            raise UnsupportedInputError(
                f"expected inverse (b, n, n), factor (b, n, n) and shift (b,) at place {index}, got "
                f"{tuple(x.shape)}, {tuple(f.shape)} and {tuple(s.shape)}"
            )
        if not x.dtype == f.dtype == s.dtype or not x.device == f.device == s.device == factors[0].device:
            raise UnsupportedInputError(
                f"expected one dtype at place {index} and one device, got {x.dtype} on {x.device}, {f.dtype} on "
                f"{f.device}, {s.dtype} on {s.device}"
            )


@triton_op("triton_curv::damped_inverse_", mutates_args={"inverses"})
def _damped_inverse_op(
    inverses: list[Tensor],
    factors: list[Tensor],
    shifts: list[Tensor],
    iterations: int = 8,
    order: int = 3,
    config: list[int] | None = None,
    tables: str = "",
) -> Tensor:
    if use_reference(factors[0]) or not supports(inverses, factors, shifts):
        _check(inverses, factors, shifts, iterations, order)
        return damped_inverse_reference(inverses, factors, shifts, iterations, order)
    parsed = None if config is None else DampedInverseConfig.from_ints(config)
    return launch_damped_inverse_(inverses, factors, shifts, iterations, order, parsed)


def damped_inverse_(
    inverses: Sequence[Tensor],
    factors: Sequence[Tensor],
    shifts: Sequence[Tensor],
    iterations: int = 8,
    order: int = 3,
    config: DampedInverseConfig | None = None,
) -> Tensor:
    """`x.copy_(torch.linalg.inv(f + s[:, None, None] * I))` for all banks, as far as `iterations` steps go.

    Made for GPUs. On a CPU Cholesky is faster: 3 steps from a warm start take 5 times as long as `cholesky_ex` and
    `cholesky_inverse`, 8 from a cold one 10 times (16 of n = 64 and 4 of 145, `python -m profiles.bench_kernels`).

    Args:
        inverses: (b, n, n) for each bank, changed in place; they hold where to start from, anything at all, and end
            bitwise symmetric. A caller who wants the old ones when this fails keeps a copy.
        factors: (b, n, n), symmetric, fp32 (fp64: by the reference).
        shifts: (b,), positive, of the factors' dtype.
        iterations: most steps of a matrix; 0 measures only.
        order: 2 or 3.
        config: tiling of the Triton kernels; None means the tuner's choice, `default_config` without one.

    Returns:
        ||I - (F + s I) X||_F of each X returned, (sum of b,), banks in their order. At most 0.01, say, means success.

    Raises:
        UnsupportedInputError: lists, shapes or dtypes that do not match, or another order.

    """
    if not torch.compiler.is_compiling() and (not factors or use_reference(factors[0])):
        _check(inverses, factors, shifts, iterations, order)
        return damped_inverse_reference(inverses, factors, shifts, iterations, order)
    ints = None if config is None else config.to_ints()
    return torch.ops.triton_curv.damped_inverse_(inverses, factors, shifts, iterations, order, ints, tables_key())
