# mypy: ignore-errors
# (Triton's language is untyped)
"""Heavy-ball momentum over lists of tensors, with weight decay, one scale for each update, and rescaled weights.

    u = scale * update                        decoupled decay, the default
    u = scale * update + weight_decay * p     coupled decay, as torch.optim.SGD has it
    m = momentum * m + u
    p = (1 - lr * weight_decay) * p - lr * (momentum_weight * m + update_weight * u)     without (...) * p if coupled
    p = rescale * p / (||p|| + 1e-9)          where rescale > 0

(momentum_weight, update_weight) = (1, 0) is plain heavy ball, (momentum, 1) Nesterov's look-ahead as torch.optim.SGD
writes it; both divided by 1 - momentum^t take out the average's start.

Shapes: three lists of tensors of pairwise equal shapes and any strides; `scales`: as many 0-dim tensors;
`hyper` (5,) = [lr, momentum, weight_decay, momentum_weight, update_weight], on the tensors' device, so that neither
new values nor a CUDA graph need a new compilation. Dtypes: params and updates fp32, fp16 or bf16, momenta fp32; the
reference takes fp64, too. Arithmetic is fp32; parameters are rounded once, rescaled ones a second time.

One launch for all tensors; a second one rescales, if there is something to rescale. In a graph of torch.compile it is
one launch a tensor (see `pointer_table`).
Source: Loshchilov and Hutter, arXiv 1711.05101 (decoupled decay); Osawa et al., arXiv 1811.12019 (the scales carry KL
clipping) and 2002.06015 equation 24 (rescaling to sqrt(2 d_out)).
"""

import struct
from collections.abc import Sequence
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
from triton_curv_kernels.choice import ListProblem, choose, tables_key
from triton_curv_kernels.momentum_host import momentum_update_on_host_, runs_on_host
from triton_curv_kernels.momentum_kernels import momentum_update_kernel, rescale_kernel
from triton_curv_kernels.pointer_table import (
    CODES,
    CONFIGS,
    ListConfig,
    check_shapes,
    default_config,
    default_for,
    merged_axes,
    pieces,
    pointer_table,
    prune,
)
from triton_curv_kernels.pointer_table_device import DTYPES

__all__ = [
    "CONFIGS",
    "NUMERICS",
    "default_config",
    "prune",
    "ListConfig",
    "momentum_update_",
    "momentum_update_reference",
    "launch_momentum_update_",
    "supports",
]

RESCALE_EPS = 1e-9
NUMERICS = ("BLOCK", "num_warps")  # the norms of rescaled parameters; nothing else depends on the config


def momentum_update_reference(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    hyper: Tensor,
    *,
    coupled: bool = False,
    rescale: Sequence[float] | None = None,
) -> None:
    """The update as `torch._foreach_*` calls, five by default, in place and without a look at any value."""
    if not params:
        return  # foreach functions refuse empty lists
    lr, momentum, weight_decay, momentum_weight, update_weight = hyper.unbind()
    wide = [p if p.dtype == m.dtype else p.to(m.dtype) for p, m in zip(params, momentum_buffers, strict=True)]
    if coupled:
        terms = torch._foreach_mul(wide, weight_decay)
        torch._foreach_addcmul_(terms, updates, scales)
        updates, scales = terms, [torch.ones_like(lr)] * len(wide)
    torch._foreach_mul_(momentum_buffers, momentum)
    torch._foreach_addcmul_(momentum_buffers, updates, scales)
    if not coupled:
        torch._foreach_mul_(wide, 1 - lr * weight_decay)
    torch._foreach_addcmul_(wide, momentum_buffers, [-lr * momentum_weight] * len(wide))
    torch._foreach_addcmul_(wide, updates, torch._foreach_mul(scales, -lr * update_weight))
    for param, result in zip(params, wide, strict=True):
        if result is not param:
            param.copy_(result)
    if rescale is not None:
        _rescale_reference(params, rescale)


def _rescale_reference(params: Sequence[Tensor], rescale: Sequence[float]) -> None:
    flagged = [(p, length) for p, length in zip(params, rescale, strict=True) if length > 0]
    if not flagged:
        return
    tensors, lengths = zip(*flagged, strict=True)
    wide = [p if p.dtype == torch.float64 else p.float() for p in tensors]
    factors = torch._foreach_reciprocal(torch._foreach_add(torch._foreach_norm(wide), RESCALE_EPS))
    torch._foreach_mul_(factors, list(lengths))
    torch._foreach_copy_(tensors, torch._foreach_mul(wide, factors))


def supports(params: Sequence[Tensor], momentum_buffers: Sequence[Tensor], updates: Sequence[Tensor]) -> bool:
    """Whether the Triton path takes these dtypes: fp32, fp16 or bf16 params and updates, fp32 momenta.

    For others, fp64 say, the op takes the reference.
    """
    return {t.dtype for t in chain(params, updates)} <= CODES.keys() and {t.dtype for t in momentum_buffers} <= {
        torch.float32
    }


@on_own_device
def launch_momentum_update_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    hyper: Tensor,
    *,
    coupled: bool = False,
    rescale: Sequence[float] | None = None,
    config: ListConfig | None = None,
) -> None:
    """`momentum_update_` by Triton, whatever the device: one launch, two with `rescale`; traced, as many per tensor."""
    lists = (params, momentum_buffers, updates)

    def check() -> None:
        _check(*lists, scales, hyper, rescale)
        if not supports(*lists):
            raise UnsupportedInputError(
                "expected fp32, fp16 or bf16 params and updates and fp32 momenta, got "
                f"{sorted({str(t.dtype) for t in (*params, *updates)})} and "
                f"{sorted({str(t.dtype) for t in momentum_buffers})}"
            )
        for place, scale in enumerate(scales):  # which the kernel reads through their addresses
            if scale.device != params[0].device:
                raise UnsupportedInputError(
                    f"expected scales on {params[0].device}, got one at place {place} on {scale.device}"
                )

    numel = sum(p.numel() for p in params)
    if numel == 0:
        return check()
    hyper = hyper.contiguous()
    config = config or choose("momentum_update_", ListProblem.of(params), default_for)
    lengths = list(rescale) if rescale is not None and any(length > 0 for length in rescale) else None
    if is_traced(*lists, scales):
        check()
        return _launch_each(*lists, scales, hyper, coupled, lengths, config)
    _check_scalars(params, scales, hyper, rescale)
    if len({s.dtype for s in scales}) > 1:
        scales = torch.stack([s.float() for s in scales]).unbind()
    words = [(s.data_ptr() - scales[0].data_ptr(), 0) for s in scales]
    if lengths is not None:
        words = [(offset, _bits(length)) for (offset, _), length in zip(words, lengths, strict=True)]
    table = pointer_table(lists, config.BLOCK, check, words)
    partials = _partials(table.programs, hyper) if lengths is not None else None
    param, _, update = table.dtypes
    grid = (table.programs,)
    wrap_triton(momentum_update_kernel)[grid](
        *(table.records, table.blocks, None, None, None, scales[0], hyper, partials),
        *[None] * 16,
        PARAM=DTYPES[param],
        UPDATE=DTYPES[update],
        COUPLED=coupled,
        DENSE=False,
        BLOCK=config.BLOCK,
        num_warps=config.num_warps,
    )
    if partials is not None:
        wrap_triton(rescale_kernel)[grid](
            *(table.records, table.blocks, None, partials),
            *[None] * 10,
            PARAM=DTYPES[param],
            EPS=RESCALE_EPS,
            BLOCK=config.BLOCK,
            num_warps=config.num_warps,
        )
    return None


def _launch_each(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    hyper: Tensor,
    coupled: bool,
    lengths: Sequence[float] | None,
    config: ListConfig,
) -> None:
    """The same without a table, for traces: a launch a tensor, two for one that is rescaled."""
    for place, tensors in enumerate(zip(params, momentum_buffers, updates, scales, strict=True)):
        param, momentum, update, scale = tensors
        parts = list(pieces(merged_axes(*tensors[:3]), 3)) if param.numel() > 0 else []
        blocks = [triton.cdiv(part.numel, config.BLOCK) for part in parts]
        length = lengths[place] if lengths is not None else 0.0
        partials = _partials(sum(blocks), hyper) if length > 0 and blocks else None
        first = 0
        for part, count in zip(parts, blocks, strict=True):
            wrap_triton(momentum_update_kernel)[(count,)](
                *(None, None, param, momentum, update, scale, hyper, partials),
                *(part.numel, part.inner.size, part.middle.size, first, *part.starts, *part.strides),
                PARAM=DTYPES[param.dtype],
                UPDATE=DTYPES[update.dtype],
                COUPLED=coupled,
                DENSE=part.dense,
                BLOCK=config.BLOCK,
                num_warps=config.num_warps,
            )
            first += count
        if partials is not None:
            for part, count in zip(parts, blocks, strict=True):
                wrap_triton(rescale_kernel)[(count,)](
                    *(None, None, param, partials, part.numel, part.inner.size, part.middle.size),
                    *(0, sum(blocks), length, part.starts[0]),
                    *(axis.strides[0] for axis in (part.outer, part.middle, part.inner)),
                    PARAM=DTYPES[param.dtype],
                    EPS=RESCALE_EPS,
                    BLOCK=config.BLOCK,
                    num_warps=config.num_warps,
                )


def _partials(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=like.device)


def _bits(value: float) -> int:
    """The bits of a float32, as an integer."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _check(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    hyper: Tensor,
    rescale: Sequence[float] | None,
) -> None:
    if not len(params) == len(momentum_buffers) == len(updates) == len(scales):
        raise UnsupportedInputError(
            "expected lists of one length, got "
            f"{len(params)} params, {len(momentum_buffers)} momenta, {len(updates)} updates, {len(scales)} scales"
        )
    _check_scalars(params, scales, hyper, rescale)
    check_shapes(params, momentum_buffers, updates)


def _check_scalars(
    params: Sequence[Tensor], scales: Sequence[Tensor], hyper: Tensor, rescale: Sequence[float] | None
) -> None:
    """What the key of a table does not hold."""
    if rescale is not None and len(rescale) != len(params):
        raise UnsupportedInputError(f"expected {len(params)} lengths to rescale to, got {len(rescale)}")
    if hyper.shape != (5,):
        raise UnsupportedInputError(
            "expected hyper (5,) = [lr, momentum, weight_decay, momentum_weight, update_weight], got "
            f"{tuple(hyper.shape)}"
        )
    if max(map(Tensor.dim, scales), default=0) > 0:
        place = next(i for i, s in enumerate(scales) if s.dim() != 0)
        raise UnsupportedInputError(f"expected a 0-dim scale at place {place}, got {tuple(scales[place].shape)}")


@triton_op("triton_curv::momentum_update_", mutates_args={"params", "momentum_buffers"})
def _momentum_update_op(
    params: list[Tensor],
    momentum_buffers: list[Tensor],
    updates: list[Tensor],
    scales: list[Tensor],
    hyper: Tensor,
    coupled: bool = False,
    rescale: list[float] | None = None,
    config: list[int] | None = None,
    tables: str = "",
) -> None:
    lists = (params, momentum_buffers, updates, scales, hyper)
    if use_reference(hyper) or not supports(params, momentum_buffers, updates):
        _check(*lists, rescale)
        momentum_update_reference(*lists, coupled=coupled, rescale=rescale)
    else:
        parsed = None if config is None else ListConfig.from_ints(config)
        launch_momentum_update_(*lists, coupled=coupled, rescale=rescale, config=parsed)


def momentum_update_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    hyper: Tensor,
    *,
    coupled: bool = False,
    rescale: Sequence[float] | None = None,
    config: ListConfig | None = None,
) -> None:
    """`m.mul_(momentum).add_(s * u); p.mul_(1 - lr * wd).sub_(lr * (momentum_weight * m + update_weight * s * u))`.

    Args:
        params: changed in place; any strides; call it under `torch.no_grad()`.
        momentum_buffers: changed in place; fp32 (fp64 with fp64 params), any strides.
        updates: directions to descend along; any strides.
        scales: 0-dim tensors, one for each update.
        hyper: (5,) = [lr, momentum, weight_decay, momentum_weight, update_weight], on the tensors' device.
        coupled: add wd * p to the scaled update, and so to the momentum, instead of shrinking p.
        rescale: for each parameter the norm it gets after the step, sqrt(2 d_out) say; 0 leaves it as it is.
        config: of the Triton kernel; None means `default_config`.

    Raises:
        UnsupportedInputError: lists that do not match.

    """
    if not torch.compiler.is_compiling() and use_reference(hyper):
        _check(params, momentum_buffers, updates, scales, hyper, rescale)
        lists = (params, momentum_buffers, updates)
        if not coupled and rescale is None and runs_on_host(*lists):
            momentum_update_on_host_(*lists, torch.stack(list(scales)).tolist(), hyper.tolist())
            return
        momentum_update_reference(params, momentum_buffers, updates, scales, hyper, coupled=coupled, rescale=rescale)
    else:
        lengths = None if rescale is None else list(rescale)
        ints = None if config is None else config.to_ints()
        lists = (params, momentum_buffers, updates, scales)
        torch.ops.triton_curv.momentum_update_(*lists, hyper, coupled, lengths, ints, tables_key())
