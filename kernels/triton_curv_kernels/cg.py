# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""Conjugate-gradient recurrences over lists of tensors, with the new residual's square on the way.

`cg_update_`, given the step length a of one iteration of A x = b:

    x = x + a p
    r = r - a A p
    rr = <r, r>        over all tensors, summed in a fixed order

`cg_direction_`, given b = <r_new, z_new> / <r, z>:

    p = z + b p        z is the (preconditioned) residual

Both scalars are read from device memory, so that an iteration needs no synchronisation. Where a = 0, A p is not
looked at: a solve that has ended goes on with a = 0, whatever the product gives, and changes nothing.

Shapes: lists of tensors of pairwise equal shapes, any strides; scalars (). Dtypes: fp32 (the reference also takes
fp64); `step` and `beta` any floating dtype. Arithmetic is fp32.
Source: Hestenes and Stiefel 1952; arXiv 2208.02017 Algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.backend import UnsupportedInputError, use_reference, wrap_triton


def cg_update_reference(
    solution: Sequence[Tensor],
    residual: Sequence[Tensor],
    direction: Sequence[Tensor],
    product: Sequence[Tensor],
    step: Tensor,
    square: Tensor,
    *,
    host_scalars: bool = False,
) -> None:
    """The update in torch._foreach_* calls, in place.

    `host_scalars` reads the step into a Python float: less memory traffic on a CPU, but a synchronisation on a GPU
    and impossible while tracing. Equal to rounding either way.
    """
    if not solution:
        square.zero_()
        return
    if host_scalars:
        length = step.item()
        if length != 0:
            torch._foreach_add_(solution, direction, alpha=length)
            torch._foreach_add_(residual, product, alpha=-length)
    else:
        torch._foreach_add_(solution, torch._foreach_mul(direction, step.to(solution[0].dtype)))
        steps = [torch.where(step != 0, step.to(t.dtype) * t, 0.0) for t in product]
        torch._foreach_sub_(residual, steps)
    square.copy_(torch.stack(torch._foreach_norm(residual)).square().sum())


def cg_direction_reference(direction: Sequence[Tensor], residual: Sequence[Tensor], beta: Tensor) -> None:
    """The new direction in torch._foreach_* calls, in place."""
    if direction:
        torch._foreach_mul_(direction, beta.to(direction[0].dtype))
        torch._foreach_add_(direction, residual)


@dataclass(frozen=True)
class CGConfig:
    """Elements a program updates, and its warps."""

    block: int
    num_warps: int


DEFAULT_CONFIG = CGConfig(block=1024, num_warps=4)
CONFIGS = tuple(CGConfig(block, warps) for block in (512, 1024, 2048, 4096) for warps in (2, 4, 8))
FINISH_BLOCK = 1024


def prune(configs: Sequence[CGConfig], numel: int) -> list[CGConfig]:
    """Configs worth measuring for `numel` elements: 4 to 16 elements a thread, no block twice as long as the data."""
    fitting = [c for c in configs if 4 <= c.block // (32 * c.num_warps) <= 16]
    return [c for c in fitting if c.block < 2 * numel] or fitting[:1]


@triton.jit(do_not_specialize=["first_partial"])
def _cg_update_kernel(
    # tensors of `numel` elements in one memory order
    solution_ptr,
    residual_ptr,
    direction_ptr,
    product_ptr,
    # () and one partial sum a program
    step_ptr,
    partial_ptr,
    # sizes
    numel,
    first_partial,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    step = tl.load(step_ptr).to(tl.float32)
    moving = offs < tl.where(step != 0, numel, 0)

    solution = tl.load(solution_ptr + offs, mask=moving, other=0.0)
    direction = tl.load(direction_ptr + offs, mask=moving, other=0.0)
    product = tl.load(product_ptr + offs, mask=moving, other=0.0)
    residual = tl.load(residual_ptr + offs, mask=mask, other=0.0) - step * product

    tl.store(solution_ptr + offs, solution + step * direction, mask=moving)
    tl.store(residual_ptr + offs, residual, mask=moving)
    tl.store(partial_ptr + first_partial + pid, tl.sum(residual * residual))


@triton.jit
def _cg_finish_kernel(partial_ptr, square_ptr, num_partials, BLOCK: tl.constexpr):
    # the sum of all partials, by one program in a fixed order
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_partials, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + offs, mask=offs < num_partials, other=0.0)
    tl.store(square_ptr, tl.sum(sums))


@triton.jit
def _cg_direction_kernel(direction_ptr, residual_ptr, beta_ptr, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    beta = tl.load(beta_ptr).to(tl.float32)
    direction = tl.load(direction_ptr + offs, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
    tl.store(direction_ptr + offs, residual + beta * direction, mask=mask)


def supports(*lists: Sequence[Tensor]) -> bool:
    """Whether the Triton launchers take these lists of tensors: fp32; the reference takes fp64, too."""
    return all(t.dtype == torch.float32 for tensors in lists for t in tensors)


def _check_supported(op: str, *lists: Sequence[Tensor]) -> None:
    if not supports(*lists):
        found = sorted({str(t.dtype) for tensors in lists for t in tensors})
        raise UnsupportedInputError(f"{op} in Triton: expected float32 tensors, got {', '.join(found)}")


def _dense(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the tensors in the first one's memory order, and dense versions of them: themselves or copies."""
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    views = [t.permute(order) for t in tensors]
    return views, [t.contiguous() for t in views]


def launch_cg_update(
    solution: Sequence[Tensor],
    residual: Sequence[Tensor],
    direction: Sequence[Tensor],
    product: Sequence[Tensor],
    step: Tensor,
    square: Tensor,
    config: CGConfig = DEFAULT_CONFIG,
) -> None:
    """`cg_update_` in Triton: one launch a tensor, one to finish the sum; any strides.

    Tensors that don't share one dense memory order are copied to the solution's order and back.

    Raises:
        UnsupportedInputError: a dtype that `supports` refuses.

    """
    _check_supported("cg_update_", solution, residual, direction, product)
    programs = [triton.cdiv(t.numel(), config.block) for t in solution]
    if sum(programs) == 0:
        square.zero_()
        return
    partials = torch.empty(sum(programs), dtype=torch.float32, device=square.device)
    update, finish = wrap_triton(_cg_update_kernel), wrap_triton(_cg_finish_kernel)
    first = 0
    for x, r, p, Ap, count in zip(solution, residual, direction, product, programs, strict=True):
        if count == 0:
            continue
        views, dense = _dense((x, r, p, Ap))
        update[(count,)](*dense, step, partials, x.numel(), first, BLOCK=config.block, num_warps=config.num_warps)
        for view, copy in zip(views[:2], dense[:2], strict=True):
            if copy is not view:
                view.copy_(copy)
        first += count
    finish[(1,)](partials, square, first, BLOCK=FINISH_BLOCK, num_warps=4)


def launch_cg_direction(
    direction: Sequence[Tensor], residual: Sequence[Tensor], beta: Tensor, config: CGConfig = DEFAULT_CONFIG
) -> None:
    """`cg_direction_` in Triton: one launch a tensor; any strides.

    Raises:
        UnsupportedInputError: a dtype that `supports` refuses.

    """
    _check_supported("cg_direction_", direction, residual)
    kernel = wrap_triton(_cg_direction_kernel)
    for p, z in zip(direction, residual, strict=True):
        if p.numel() == 0:
            continue
        views, dense = _dense((p, z))
        kernel[(triton.cdiv(p.numel(), config.block),)](
            *dense, beta, p.numel(), BLOCK=config.block, num_warps=config.num_warps
        )
        if dense[0] is not views[0]:
            views[0].copy_(dense[0])


@triton_op("triton_curv::cg_update_", mutates_args={"solution", "residual", "square"})
def _cg_update_op(
    solution: list[Tensor],
    residual: list[Tensor],
    direction: list[Tensor],
    product: list[Tensor],
    step: Tensor,
    square: Tensor,
) -> None:
    lists = (solution, residual, direction, product)
    if use_reference(square) or not supports(*lists):
        cg_update_reference(*lists, step, square)
    else:
        launch_cg_update(*lists, step, square)


@triton_op("triton_curv::cg_direction_", mutates_args={"direction"})
def _cg_direction_op(direction: list[Tensor], residual: list[Tensor], beta: Tensor) -> None:
    if use_reference(beta) or not supports(direction, residual):
        cg_direction_reference(direction, residual, beta)
    else:
        launch_cg_direction(direction, residual, beta)


def cg_update_(
    solution: list[Tensor],
    residual: list[Tensor],
    direction: list[Tensor],
    product: list[Tensor],
    step: Tensor,
    square: Tensor,
) -> None:
    """`x += a * p; r -= a * Ap; square = <r, r>` over lists, in place.

    Args:
        solution: x, changed in place; fp32 (fp64 on the reference), any shapes and strides.
        residual: r, changed in place; shaped as x.
        direction: p, shaped as x.
        product: A p, shaped as x; not looked at where the step is 0.
        step: a, shape (), on the tensors' device.
        square: overwritten by <r, r> over all tensors, shape ().

    Raises:
        UnsupportedInputError: lists of unequal lengths, or a scalar of another shape.

    """
    sizes = len(solution), len(residual), len(direction), len(product)
    if len(set(sizes)) != 1 or step.dim() != 0 or square.dim() != 0:
        raise UnsupportedInputError(
            "cg_update_: expected four lists of one length and scalars of shape (), "
            f"got lists of {sizes}, {tuple(step.shape)} and {tuple(square.shape)}"
        )
    if not torch.compiler.is_compiling() and use_reference(square):
        real_on_host = type(step) is Tensor and step.device.type == "cpu"  # not fake, say
        cg_update_reference(solution, residual, direction, product, step, square, host_scalars=real_on_host)
        return
    torch.ops.triton_curv.cg_update_(solution, residual, direction, product, step, square)


def cg_direction_(direction: list[Tensor], residual: list[Tensor], beta: Tensor) -> None:
    """`p = z + b * p` over lists, in place.

    Args:
        direction: p, changed in place; fp32 (fp64 on the reference), any shapes and strides.
        residual: z, shaped as p.
        beta: b, shape (), on the tensors' device.

    Raises:
        UnsupportedInputError: lists of unequal lengths, or a scalar of another shape.

    """
    if len(direction) != len(residual) or beta.dim() != 0:
        raise UnsupportedInputError(
            "cg_direction_: expected two lists of one length and a scalar of shape (), "
            f"got lists of {len(direction)} and {len(residual)} and {tuple(beta.shape)}"
        )
    if not torch.compiler.is_compiling() and use_reference(beta):
        cg_direction_reference(direction, residual, beta)
        return
    torch.ops.triton_curv.cg_direction_(direction, residual, beta)
