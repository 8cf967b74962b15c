"""The plain-torch reference of `accumulate_factor_`: the path that CPUs take, dense and packed."""

import torch
from torch import Tensor
from torch.nn import functional

from triton_curv_kernels.packed import packed_blocks

PANEL = 64  # columns of a triangle that are multiplied at a time


def accumulate_factor_reference(
    factor: Tensor, rows: Tensor, alpha: float = 1.0, beta: float = 1.0, ones: bool = False
) -> None:
    """`factor.mul_(beta).add_(X.mT @ X, alpha=alpha)` with `X = torch.cat([rows, 1], -1)` if `ones`, else `X = rows`.

    A factor of one dimension less than the rows is packed.
    """
    if factor.dim() < rows.dim():
        _accumulate_packed(factor, rows, alpha, beta, ones)
    else:
        _accumulate_dense(factor, rows, alpha, beta, ones)


def _accumulate_dense(factor: Tensor, rows: Tensor, alpha: float, beta: float, ones: bool) -> None:
    """What it does beside one product is measured on one CPU thread.

    A copy of X with its ones costs less than the calls that a border takes if it is small, and panels of 64 columns,
    mirrored, take 0.66 of a whole product's time at K, n = 2048, 288 and 0.77 at 2048, 144; of 128 columns 0.76 at 256,
    784 and 0.88 at 125, 1000.
    """
    rows = rows.to(factor.dtype)
    if ones and rows.numel() <= 1 << 16:
        rows, ones = functional.pad(rows, (0, 1), value=1.0), False
    k, n = rows.shape[-2:]
    core = factor[..., :n, :n] if ones else factor
    if factor.dim() == 3:
        core.baddbmm_(rows.mT, rows, beta=beta, alpha=alpha)
    elif n < 128 or (k < 4 * n and n < 384):
        core.addmm_(rows.mT, rows, beta=beta, alpha=alpha)
    else:
        width = PANEL if k >= 4 * n else 2 * PANEL
        for i in range(0, n, width):
            panel = core[i:, i : i + width]
            panel.addmm_(rows[:, i:].mT, rows[:, i : i + width], beta=beta, alpha=alpha)
            core[i : i + width, i + width :].copy_(panel[width:].mT)
    if not ones:
        return
    border = factor[..., n, :]
    if beta == 0.0:
        border.zero_()  # 0 * NaN is not 0
    elif beta != 1.0:
        border.mul_(beta)
    border[..., :n].add_(rows.sum(-2), alpha=alpha)
    border[..., n].add_(alpha * k)
    factor[..., :n, n].copy_(border[..., :n])


def _accumulate_packed(factor: Tensor, rows: Tensor, alpha: float, beta: float, ones: bool) -> None:
    """The lower left block is one product in place; the triangles go through temporaries, by panels if they are large.

    Time over the dense form's, one CPU thread: 1.10, 0.83, 0.99 at (K, n) = (2048, 288), (128, 785), (4096, 577).
    """
    rows = rows.to(factor.dtype)
    if ones:
        rows = functional.pad(rows, (0, 1), value=1.0)
    n = rows.shape[-1]
    if n == 0:
        return
    half = (n + 1) // 2
    left, right = rows[..., :half], rows[..., half:]
    first, last, below = packed_blocks(factor, n)
    if factor.dim() == 2:
        below.baddbmm_(right.mT, left, beta=beta, alpha=alpha)
    else:
        below.addmm_(right.mT, left, beta=beta, alpha=alpha)
    if factor.dim() == 2 or n < 192:
        _write_triangle(first, left.mT @ left, alpha, beta)
        _write_triangle(last.mT, right.mT @ right, alpha, beta)
    else:
        _accumulate_triangle(first, left, alpha, beta)
        _accumulate_triangle(last.mT, right, alpha, beta)


def _write_triangle(target: Tensor, product: Tensor, alpha: float, beta: float) -> None:
    """tril(target) <- beta tril(target) + alpha tril(product); what is above the diagonal stays."""
    n = product.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool, device=product.device).tril_()
    scaled = product.mul_(alpha) if beta == 0.0 else torch.add(product.mul_(alpha), target, alpha=beta)
    torch.where(lower, scaled, target, out=scaled)
    target.copy_(scaled)


def _accumulate_triangle(target: Tensor, rows: Tensor, alpha: float, beta: float) -> None:
    """tril(target) <- beta tril(target) + alpha tril(rows^T rows): by panels, in place but on the diagonal."""
    n = rows.shape[-1]
    for i in range(0, n, PANEL):
        columns = rows[:, i : i + PANEL]
        below = target[i + PANEL :, i : i + PANEL]
        below.addmm_(rows[:, i + PANEL :].mT, columns, beta=beta, alpha=alpha)
    whole = n // PANEL
    if whole:
        blocks = rows[:, : whole * PANEL].unflatten(1, (whole, PANEL)).movedim(1, 0)
        on_diagonal = target.as_strided(
            (whole, PANEL, PANEL), (PANEL * sum(target.stride()), *target.stride()), target.storage_offset()
        )
        _write_triangle(on_diagonal, blocks.mT @ blocks, alpha, beta)
    if n % PANEL:
        columns = rows[:, whole * PANEL :]
        _write_triangle(target[whole * PANEL :, whole * PANEL :], columns.mT @ columns, alpha, beta)
