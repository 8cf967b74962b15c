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
One launch for all tensors, a second one finishes the norm. In a graph of torch.compile it is one launch a tensor (see
`pointer_table`).
Source: Krishnan, Xiao, Saurous 2018, arXiv 1712.03298, Algorithm 2 lines 9-12 and equation 8.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.backend import (
    UnsupportedInputError,
    is_traced,
    on_own_device,
    use_reference,
    wrap_triton,
)
from triton_curv_kernels.choice import ListProblem, choose, tables_key
from triton_curv_kernels.pointer_table import (
    CODES,
    CONFIGS,
    ListConfig,
    check_shapes,
    default_config,
    default_for,
    dense_views,
    pointer_table,
    prune,
)
from triton_curv_kernels.pointer_table_device import (
    DTYPES,
    STEPS,
    find_block,
    launch_finish,
    length_of_block,
    offsets,
    read,
    record_base,
    record_code,
    record_size,
    record_strides,
    split_index,
    write,
)

__all__ = [
    "CONFIGS",
    "NUMERICS",
    "default_config",
    "prune",
    "ListConfig",
    "neumann_update_",
    "neumann_update_reference",
    "launch_neumann_update_",
    "supports",
]

DISTANCE_FLOOR = 1e-8
NUMERICS = ("BLOCK", "num_warps")  # the fields of a config that the new distance depends on, in its last bits


def neumann_update_reference(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    distance: Tensor,
    hyper: Tensor,
    *,
    host_scalars: bool = False,
) -> None:
    """The update in torch._foreach_* calls, in place.

    `host_scalars` reads the scalars into Python floats: fewer passes over memory, but a synchronisation on a GPU and
    impossible while tracing. Equal to rounding either way. Parameters narrower than their buffers do without, so that
    they are rounded once.
    """
    if not params:
        distance.zero_()
        return
    if host_scalars and [p.dtype for p in params] == [v.dtype for v in exp_avgs]:
        _update_by_host_scalars(params, momentum_buffers, exp_avgs, grads, distance, hyper)
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
    if is_traced(*exp_avgs):
        # a compiler fuses sums of single tensors with what makes these, and makes no tensor for each of their views
        square = reduce(torch.add, [t.square().sum() for t in exp_avgs])
        distance.copy_(square.sqrt())
    else:
        distance.copy_(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(exp_avgs))))
    torch._foreach_add_(exp_avgs, params)


def _update_by_host_scalars(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    distance: Tensor,
    hyper: Tensor,
) -> None:
    lr, mu, alpha, beta_n, gamma = hyper.tolist()
    D = distance.item()
    pull = alpha * D - beta_n / max(D, DISTANCE_FLOOR) ** 3
    gap = torch._foreach_sub(params, exp_avgs)
    torch._foreach_add_(params, momentum_buffers, alpha=-mu)  # mu m_new - lr d = (1 + mu) m_new - mu m
    torch._foreach_mul_(momentum_buffers, hyper[1].to(exp_avgs[0].dtype))
    torch._foreach_add_(momentum_buffers, grads, alpha=-lr)
    torch._foreach_add_(momentum_buffers, gap, alpha=-lr * pull)
    torch._foreach_add_(params, momentum_buffers, alpha=1 + mu)
    gap = torch._foreach_sub(params, exp_avgs)
    torch._foreach_add_(exp_avgs, gap, alpha=1 - gamma)
    distance.copy_(gamma * torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gap))))


@triton.jit
def _update_block(
    bases,  # of param, momentum, exp_avg and grad: addresses or pointers
    param_offs,
    momentum_offs,
    exp_avg_offs,
    grad_offs,
    mask,
    pull,
    hyper,  # lr, mu, gamma
    codes,  # of the dtypes of param and grad
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    VECTORS: tl.constexpr,
):
    lr, mu, gamma = hyper
    param = read(bases[0], param_offs, mask, codes[0], PARAM, VECTORS)
    momentum = read(bases[1], momentum_offs, mask, 0, tl.float32, VECTORS)
    exp_avg = read(bases[2], exp_avg_offs, mask, 0, tl.float32, VECTORS)
    grad = read(bases[3], grad_offs, mask, codes[1], GRAD, VECTORS)

    move = lr * (grad + pull * (param - exp_avg))
    momentum = mu * momentum - move
    write(bases[1], momentum_offs, mask, momentum, 0, tl.float32, VECTORS)
    stored = write(bases[0], param_offs, mask, param + (mu * momentum - move), codes[0], PARAM, VECTORS)
    gap = stored - exp_avg
    write(bases[2], exp_avg_offs, mask, exp_avg + (1.0 - gamma) * gap, 0, tl.float32, VECTORS)
    return gamma * gap


# None stands for what a call does without: the table, or the pointers of one tensor of each list
@triton.jit(do_not_specialize=["first_partial"])
def _update_kernel(
    # the table
    records_ptr,
    blocks_ptr,
    # or dense tensors of `numel` elements in one memory order
    param_ptr,
    momentum_ptr,
    exp_avg_ptr,
    grad_ptr,
    # (), (5,) and one partial square sum a program
    distance_ptr,
    hyper_ptr,
    partial_ptr,
    # sizes without a table
    numel,
    first_partial,
    # configuration
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    DISTANCE_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    distance = tl.load(distance_ptr).to(tl.float32)
    alpha = tl.load(hyper_ptr + 2).to(tl.float32)
    beta_n = tl.load(hyper_ptr + 3).to(tl.float32)
    floored = tl.maximum(distance, DISTANCE_FLOOR)
    pull = alpha * distance - beta_n / (floored * floored * floored)
    lr, mu = tl.load(hyper_ptr).to(tl.float32), tl.load(hyper_ptr + 1).to(tl.float32)
    hyper = (lr, mu, tl.load(hyper_ptr + 4).to(tl.float32))

    block = tl.program_id(0)
    if records_ptr is not None:
        record, first, vectors = find_block(records_ptr, blocks_ptr, BLOCK, 4)
        bases = (record_base(record, 0), record_base(record, 1), record_base(record, 2), record_base(record, 3))
        codes = (record_code(record, 0, 4), record_code(record, 3, 4))
        if vectors:
            offs = first + tl.arange(0, BLOCK)
            gap = _update_block(bases, offs, offs, offs, offs, None, pull, hyper, codes, PARAM, GRAD, VECTORS=True)
            square = tl.sum(gap * gap)
        else:
            size = record_size(record)
            p_strides, m_strides = record_strides(record, 0, 4), record_strides(record, 1, 4)
            v_strides, g_strides = record_strides(record, 2, 4), record_strides(record, 3, 4)
            squares = tl.zeros((BLOCK // STEPS,), tl.float32)
            for start in range(0, length_of_block(first, size, BLOCK), BLOCK // STEPS):
                index, mask = split_index(first + start, size, BLOCK // STEPS)
                p_offs, m_offs = offsets(index, p_strides), offsets(index, m_strides)
                v_offs, g_offs = offsets(index, v_strides), offsets(index, g_strides)
                gap = _update_block(
                    bases, p_offs, m_offs, v_offs, g_offs, mask, pull, hyper, codes, PARAM, GRAD, VECTORS=False
                )
                squares += tl.where(mask, gap * gap, 0.0)
            square = tl.sum(squares)
    else:
        bases = (param_ptr, momentum_ptr, exp_avg_ptr, grad_ptr)
        offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < numel
        gap = _update_block(bases, offs, offs, offs, offs, mask, pull, hyper, (0, 0), PARAM, GRAD, VECTORS=False)
        square = tl.sum(tl.where(mask, gap * gap, 0.0))
        block += first_partial
    tl.store(partial_ptr + block, square)


def supports(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> bool:
    """Whether the Triton launcher takes these dtypes; the reference takes the others (fp64)."""
    return {t.dtype for t in chain(params, grads)} <= CODES.keys() and {
        t.dtype for t in chain(momentum_buffers, exp_avgs)
    } <= {torch.float32}


@on_own_device
def launch_neumann_update_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    distance: Tensor,
    hyper: Tensor,
    config: ListConfig | None = None,
) -> None:
    """`neumann_update_` in Triton: one launch, one to finish the norm; any strides. Traced: one launch a tensor.

    Raises:
        UnsupportedInputError: a dtype that `supports` refuses, or shapes that differ.

    """
    lists = (params, momentum_buffers, exp_avgs, grads)
    _check(*lists, distance, hyper)

    def check() -> None:
        check_shapes(*lists)
        if not supports(*lists):
            raise UnsupportedInputError(
                "expected fp32, fp16 or bf16 params and grads and fp32 buffers, got "
                f"{sorted({str(t.dtype) for t in (*params, *grads)})} and "
                f"{sorted({str(t.dtype) for t in (*momentum_buffers, *exp_avgs)})}"
            )

    numel = sum(p.numel() for p in params)
    if numel == 0:
        check()
        distance.zero_()
        return
    hyper = hyper.contiguous()
    config = config or choose("neumann_update_", ListProblem.of(params), default_for)
    if is_traced(*lists):
        check()
        partials = _launch_each(*lists, distance, hyper, config)
    else:
        table = pointer_table(lists, config.BLOCK, check)
        partials = torch.empty(1, table.programs, dtype=torch.float32, device=distance.device)
        wrap_triton(_update_kernel)[(table.programs,)](
            *(table.records, table.blocks, None, None, None, None, distance, hyper, partials, None, None),
            PARAM=DTYPES[table.dtypes[0]],
            GRAD=DTYPES[table.dtypes[3]],
            DISTANCE_FLOOR=DISTANCE_FLOOR,
            BLOCK=config.BLOCK,
            num_warps=config.num_warps,
        )
    launch_finish(partials, distance, sqrt=True)


def _launch_each(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    distance: Tensor,
    hyper: Tensor,
    config: ListConfig,
) -> Tensor:
    """The update without a table; returns the partial sums.

    Tensors that don't share one dense memory order are copied to the parameter's order and back.
    """
    programs = [triton.cdiv(p.numel(), config.BLOCK) for p in params]
    partials = torch.empty(1, sum(programs), dtype=torch.float32, device=distance.device)
    first = 0
    for tensors, count in zip(zip(params, momentum_buffers, exp_avgs, grads, strict=True), programs, strict=True):
        if count == 0:
            continue
        views, dense = dense_views(tensors)
        wrap_triton(_update_kernel)[(count,)](
            *(None, None, *dense, distance, hyper, partials, views[0].numel(), first),
            PARAM=DTYPES[views[0].dtype],
            GRAD=DTYPES[views[3].dtype],
            DISTANCE_FLOOR=DISTANCE_FLOOR,
            BLOCK=config.BLOCK,
            num_warps=config.num_warps,
        )
        for view, copy in zip(views[:3], dense[:3], strict=True):
            if copy is not view:
                view.copy_(copy)
        first += count
    return partials


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
    config: list[int] | None = None,
    tables: str = "",
) -> None:
    lists = (params, momentum_buffers, exp_avgs, grads)
    if use_reference(distance) or not supports(*lists):
        _check(*lists, distance, hyper)
        neumann_update_reference(*lists, distance, hyper)
    else:
        launch_neumann_update_(*lists, distance, hyper, None if config is None else ListConfig.from_ints(config))


def neumann_update_(
    params: list[Tensor],
    momentum_buffers: list[Tensor],
    exp_avgs: list[Tensor],
    grads: list[Tensor],
    distance: Tensor,
    hyper: Tensor,
    config: ListConfig | None = None,
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
        config: of the Triton kernel; None means `default_config`.

    Raises:
        UnsupportedInputError: lists of unequal lengths, or `hyper` or `distance` of another shape.

    """
    if not torch.compiler.is_compiling() and use_reference(distance):
        _check(params, momentum_buffers, exp_avgs, grads, distance, hyper)
        real_on_host = type(hyper) is Tensor and hyper.device.type == "cpu"  # not fake, say
        neumann_update_reference(params, momentum_buffers, exp_avgs, grads, distance, hyper, host_scalars=real_on_host)
    else:
        ints = None if config is None else config.to_ints()
        lists = (params, momentum_buffers, exp_avgs, grads)
        torch.ops.triton_curv.neumann_update_(*lists, distance, hyper, ints, tables_key())
