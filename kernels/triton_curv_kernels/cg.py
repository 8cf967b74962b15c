# mypy: ignore-errors
# (Triton's language is untyped)
"""Conjugate-gradient recurrences over lists of tensors, with the new residual's square on the way.

`cg_update_`, given the step length a of one iteration of A x = b:

    x = x + a p
    r = r - a A p
    rr = <r, r>        over all tensors, summed in a fixed order

`cg_direction_`, given b = <r_new, z_new> / <r, z>:

    p = z + b p        z is the (preconditioned) residual

`cg_dots`, for a = <r, z> / <p, A p> and the curvature <p, A p> / <p, p>:

    <a, b>, <a, a>     over all tensors, summed in a fixed order

All scalars stay in device memory, so that an iteration needs no synchronisation. Where a = 0, A p is not
looked at: a solve that has ended goes on with a = 0, whatever the product gives, and changes nothing.

Shapes: lists of tensors of pairwise equal shapes, any strides; scalars (). Dtypes: fp32 (the reference also takes
fp64); `step` and `beta` any floating dtype. Arithmetic is fp32.
One launch for all tensors, a second, tiny one finishes sums: five for an iteration. In a graph of torch.compile it is
one launch a tensor (see `pointer_table`).
Source: Hestenes and Stiefel 1952; arXiv 2208.02017 Algorithm 1.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.backend import (
    UnsupportedInputError,
    is_traced,
    on_own_device,
    use_reference,
    wrap_triton,
)
from triton_curv_kernels.cg_kernels import cg_direction_kernel, cg_dots_kernel, cg_update_kernel
from triton_curv_kernels.choice import ListProblem, choose, tables_key
from triton_curv_kernels.pointer_table import (
    CONFIGS,
    ListConfig,
    check_shapes,
    default_config,
    default_for,
    dense_views,
    pointer_table,
    prune,
)
from triton_curv_kernels.pointer_table_device import launch_finish

__all__ = [
    "CONFIGS",
    "NUMERICS",
    "default_config",
    "prune",
    "ListConfig",
    "cg_direction_",
    "cg_dot",
    "cg_dots",
    "cg_update_",
    "cg_direction_reference",
    "cg_dot_reference",
    "cg_update_reference",
    "launch_cg_direction",
    "launch_cg_dots",
    "launch_cg_update",
    "supports",
]

NUMERICS = ("BLOCK", "num_warps")  # the fields of a config that the sums depend on, in their last bits


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


def cg_dot_reference(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a, b> by torch.dot."""
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]).sum()


def supports(*lists: Sequence[Tensor]) -> bool:
    """Whether the Triton launchers take these lists of tensors: fp32; the reference takes fp64, too."""
    return {t.dtype for t in chain(*lists)} <= {torch.float32}


def _check(op: str, *lists: Sequence[Tensor]) -> None:
    if not supports(*lists):
        found = sorted({str(t.dtype) for tensors in lists for t in tensors})
        raise UnsupportedInputError(f"{op} in Triton: expected float32 tensors, got {', '.join(found)}")
    check_shapes(*lists)


def _each(lists: Sequence[Sequence[Tensor]], block: int) -> Iterator[tuple[list[Tensor], list[Tensor], int, int]]:
    """Without a table: views and dense versions of the tensors at each place, programs, and those before them."""
    first = 0
    for tensors in zip(*lists, strict=True):
        if tensors[0].numel() > 0:
            count = triton.cdiv(tensors[0].numel(), block)
            yield *dense_views(tensors), count, first
            first += count


def _programs(tensors: Sequence[Tensor], block: int) -> int:
    return sum(triton.cdiv(t.numel(), block) for t in tensors)


def _copy_back(views: Sequence[Tensor], dense: Sequence[Tensor]) -> None:
    for view, copy in zip(views, dense, strict=True):
        if copy is not view:
            view.copy_(copy)


@on_own_device
def launch_cg_update(
    solution: Sequence[Tensor],
    residual: Sequence[Tensor],
    direction: Sequence[Tensor],
    product: Sequence[Tensor],
    step: Tensor,
    square: Tensor,
    config: ListConfig | None = None,
) -> None:
    """`cg_update_` in Triton: one launch, one to finish the sum; any strides. Traced: one launch a tensor.

    Raises:
        UnsupportedInputError: a dtype that `supports` refuses, or shapes that differ.

    """
    lists = (solution, residual, direction, product)
    check = partial(_check, "cg_update_", *lists)
    if all(t.numel() == 0 for t in solution):
        check()
        square.zero_()
        return
    config = config or choose("cg_update_", ListProblem.of(lists[0]), default_for)
    tiling = {"BLOCK": config.BLOCK, "num_warps": config.num_warps}
    kernel = wrap_triton(cg_update_kernel)
    if is_traced(*lists):
        check()
        programs = _programs(solution, config.BLOCK)
        partials = torch.empty(1, programs, dtype=torch.float32, device=square.device)
        for views, dense, count, first in _each(lists, config.BLOCK):
            kernel[(count,)](None, None, *dense, step, partials, views[0].numel(), first, **tiling)
            _copy_back(views[:2], dense[:2])
    else:
        table = pointer_table(lists, config.BLOCK, check)
        partials = torch.empty(1, table.programs, dtype=torch.float32, device=square.device)
        kernel[(table.programs,)](
            table.records, table.blocks, None, None, None, None, step, partials, None, None, **tiling
        )
    launch_finish(partials, square)


@on_own_device
def launch_cg_direction(
    direction: Sequence[Tensor], residual: Sequence[Tensor], beta: Tensor, config: ListConfig | None = None
) -> None:
    """`cg_direction_` in Triton: one launch; any strides. Traced: one launch a tensor.

    Raises:
        UnsupportedInputError: a dtype that `supports` refuses, or shapes that differ.

    """
    lists = (direction, residual)
    check = partial(_check, "cg_direction_", *lists)
    if all(t.numel() == 0 for t in direction):
        return check()
    config = config or choose("cg_direction_", ListProblem.of(lists[0]), default_for)
    tiling = {"BLOCK": config.BLOCK, "num_warps": config.num_warps}
    kernel = wrap_triton(cg_direction_kernel)
    if is_traced(*lists):
        check()
        for views, dense, count, _ in _each(lists, config.BLOCK):
            kernel[(count,)](None, None, *dense, beta, views[0].numel(), **tiling)
            _copy_back(views[:1], dense[:1])
    else:
        table = pointer_table(lists, config.BLOCK, check)
        kernel[(table.programs,)](table.records, table.blocks, None, None, beta, None, **tiling)
    return None


@on_own_device
def launch_cg_dots(a: Sequence[Tensor], b: Sequence[Tensor], config: ListConfig | None = None) -> Tensor:
    """`cg_dots` in Triton, as one tensor (2,): one launch, one to finish the sums; any strides.

    Raises:
        UnsupportedInputError: a dtype that `supports` refuses, or shapes that differ.

    """
    lists = (a, b)
    check = partial(_check, "cg_dots", *lists)
    device = a[0].device
    if all(t.numel() == 0 for t in a):
        check()
        return torch.zeros(2, dtype=torch.float32, device=device)
    config = config or choose("cg_dots", ListProblem.of(lists[0]), default_for)
    tiling = {"BLOCK": config.BLOCK, "num_warps": config.num_warps}
    kernel = wrap_triton(cg_dots_kernel)
    dots = torch.empty(2, dtype=torch.float32, device=device)
    if is_traced(*lists):
        check()
        programs = _programs(a, config.BLOCK)
        partials = torch.empty(2, programs, dtype=torch.float32, device=device)
        for views, dense, count, first in _each(lists, config.BLOCK):
            kernel[(count,)](None, None, *dense, partials, programs, views[0].numel(), first, **tiling)
    else:
        table = pointer_table(lists, config.BLOCK, check)
        partials = torch.empty(2, table.programs, dtype=torch.float32, device=device)
        kernel[(table.programs,)](
            table.records, table.blocks, None, None, partials, table.programs, None, None, **tiling
        )
    launch_finish(partials, dots)
    return dots


@triton_op("triton_curv::cg_dots", mutates_args=())
def _cg_dots_op(a: list[Tensor], b: list[Tensor], config: list[int] | None = None, tables: str = "") -> Tensor:
    if use_reference(a[0]) or not supports(a, b):
        return torch.stack([cg_dot_reference(a, b), cg_dot_reference(a, a)])
    return launch_cg_dots(a, b, None if config is None else ListConfig.from_ints(config))


@triton_op("triton_curv::cg_update_", mutates_args={"solution", "residual", "square"})
def _cg_update_op(
    solution: list[Tensor],
    residual: list[Tensor],
    direction: list[Tensor],
    product: list[Tensor],
    step: Tensor,
    square: Tensor,
    config: list[int] | None = None,
    tables: str = "",
) -> None:
    lists = (solution, residual, direction, product)
    if use_reference(square) or not supports(*lists):
        cg_update_reference(*lists, step, square)
    else:
        launch_cg_update(*lists, step, square, None if config is None else ListConfig.from_ints(config))


@triton_op("triton_curv::cg_direction_", mutates_args={"direction"})
def _cg_direction_op(
    direction: list[Tensor],
    residual: list[Tensor],
    beta: Tensor,
    config: list[int] | None = None,
    tables: str = "",
) -> None:
    if use_reference(beta) or not supports(direction, residual):
        cg_direction_reference(direction, residual, beta)
    else:
        launch_cg_direction(direction, residual, beta, None if config is None else ListConfig.from_ints(config))


def cg_update_(
    solution: list[Tensor],
    residual: list[Tensor],
    direction: list[Tensor],
    product: list[Tensor],
    step: Tensor,
    square: Tensor,
    config: ListConfig | None = None,
) -> None:
    """`x += a * p; r -= a * Ap; square = <r, r>` over lists, in place.

    Args:
        solution: x, changed in place; fp32 (fp64 on the reference), any shapes and strides.
        residual: r, changed in place; shaped as x.
        direction: p, shaped as x.
        product: A p, shaped as x; not looked at where the step is 0.
        step: a, shape (), on the tensors' device.
        square: overwritten by <r, r> over all tensors, shape ().
        config: of the Triton kernel; None means `default_config`.

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
    ints = None if config is None else config.to_ints()
    torch.ops.triton_curv.cg_update_(solution, residual, direction, product, step, square, ints, tables_key())


def cg_direction_(
    direction: list[Tensor], residual: list[Tensor], beta: Tensor, config: ListConfig | None = None
) -> None:
    """`p = z + b * p` over lists, in place.

    Args:
        direction: p, changed in place; fp32 (fp64 on the reference), any shapes and strides.
        residual: z, shaped as p.
        beta: b, shape (), on the tensors' device.
        config: of the Triton kernel; None means `default_config`.

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
    ints = None if config is None else config.to_ints()
    torch.ops.triton_curv.cg_direction_(direction, residual, beta, ints, tables_key())


def cg_dots(a: list[Tensor], b: list[Tensor], config: ListConfig | None = None) -> tuple[Tensor, Tensor]:
    """`sum(torch.dot(x, y))` and `sum(torch.dot(x, x))` over lists, in one pass.

    Args:
        a: fp32 (fp64 on the reference), any shapes and strides; at least one tensor.
        b: shaped as a.
        config: of the Triton kernel; None means `default_config`.

    Raises:
        UnsupportedInputError: lists of unequal lengths, or without a tensor.

    """
    if _dots_by_reference(a, b):
        return cg_dot_reference(a, b), cg_dot_reference(a, a)
    ints = None if config is None else config.to_ints()
    ab, aa = torch.ops.triton_curv.cg_dots(a, b, ints, tables_key()).unbind()
    return ab, aa


def cg_dot(a: list[Tensor], b: list[Tensor], config: ListConfig | None = None) -> Tensor:
    """`sum(torch.dot(x, y))` over lists; arguments and errors as those of `cg_dots`."""
    return cg_dot_reference(a, b) if _dots_by_reference(a, b) else cg_dots(a, b, config)[0]


def _dots_by_reference(a: list[Tensor], b: list[Tensor]) -> bool:
    if len(a) != len(b) or not a:
        raise UnsupportedInputError(f"cg_dots: expected two lists of one length > 0, got {len(a)} and {len(b)} tensors")
    return not torch.compiler.is_compiling() and use_reference(a[0])
