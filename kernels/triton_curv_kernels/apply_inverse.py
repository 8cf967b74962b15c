# mypy: ignore-errors
# (Triton's launches are untyped)
"""P = G^-1 D A^-1 for the gradients D of all layers, with <P, D>, ||P||^2 and the factor of KL clipping.

Shapes: lists over layers; grads and updates (r, c) or (b, r, c), inverse_G (r, r) or (b, r, r), inverse_A (c, c) or
(b, c, c), or of size (0,) for a layer with a single factor, whose P = G^-1 D. Inverses are symmetric. Dtypes: all
tensors fp32, or all fp16, or all bf16, with sums in fp32; the reference takes fp64, too. Rows are contiguous.
Source: arXiv 1811.12019 section 3; KL clipping min(1, sqrt(kappa / (lr^2 sum <P, D>))): Ba, Grosse, Martens 2017.

The Triton path takes three launches, whatever the number of layers: tiles of T = D A^-1 of all layers, longest first;
tiles of P = G^-1 T, each with its part of the sums in a workspace; and one that adds those up in a fixed order. Batches
of matrices of at most 4 x 4 with a single factor (norm layers) are applied whole in the first one, 256 to a program.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.apply_inverse_config import (
    CONFIGS,
    NUMERICS,
    ApplyConfig,
    ApplyProblem,
    default_config,
    prune,
)
from triton_curv_kernels.apply_inverse_kernels import finish_kernel, first_kernel, second_kernel
from triton_curv_kernels.apply_inverse_work import flat_work_of, work_of
from triton_curv_kernels.backend import (
    UnsupportedInputError,
    device_limits,
    is_traced,
    on_own_device,
    use_reference,
    wrap_triton,
)
from triton_curv_kernels.choice import choose_once, tables_key

__all__ = [
    # the op, its reference and its launcher
    "Applied",
    "apply_damped_inverse",
    "apply_damped_inverse_reference",
    "launch_apply_damped_inverse",
    "supports",
    # its configurations
    "CONFIGS",
    "NUMERICS",
    "ApplyConfig",
    "ApplyProblem",
    "default_config",
    "prune",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST = 1e-30  # of the predicted decrease, below which nothing is clipped


class Applied(NamedTuple):
    """What `apply_damped_inverse` measured: <P, D> and ||P||^2 of each layer, and the KL-clip factor, else 1."""

    products: Tensor
    squares: Tensor
    clip: Tensor


def apply_damped_inverse_reference(
    updates: Sequence[Tensor],
    grads: Sequence[Tensor],
    inverse_A: Sequence[Tensor],
    inverse_G: Sequence[Tensor],
    kl_clip: Tensor | None = None,
    lr: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.mm(G @ D, A, out=P)` layer by layer, then sums."""
    for update, grad, of_a, of_g in zip(updates, grads, inverse_A, inverse_G, strict=True):
        multiply = torch.mm if grad.dim() == 2 else torch.bmm
        if of_a.shape == (0,):
            multiply(of_g, grad, out=update)
        else:
            multiply(multiply(of_g, grad), of_a, out=update)
    wide = torch.float64 if any(d.dtype == torch.float64 for d in grads) else torch.float32
    if any(d.dtype != wide for d in grads):
        updates, grads = [u.to(wide) for u in updates], [d.to(wide) for d in grads]
    products = torch.stack([torch.dot(u.reshape(-1), d.reshape(-1)) for u, d in zip(updates, grads, strict=True)])
    squares = torch.stack(torch._foreach_norm(updates)).square_()
    if kl_clip is None:
        return products, squares, products.new_ones(())
    decrease = (products * lr**2).sum().clamp_min(LEAST)
    return products, squares, torch.sqrt(kl_clip / decrease).clamp_max(1.0).to(wide)


def supports(*lists: Sequence[Tensor]) -> bool:
    """Whether the Triton path takes these dtypes: fp32, fp16 or bf16, one of them for all.

    For others, fp64 say, the op takes the reference.
    """
    dtypes = {t.dtype for tensors in lists for t in tensors}
    return len(dtypes) == 1 and dtypes <= set(DTYPES)


@on_own_device
def launch_apply_damped_inverse(
    updates: Sequence[Tensor],
    grads: Sequence[Tensor],
    inverse_A: Sequence[Tensor],
    inverse_G: Sequence[Tensor],
    kl_clip: Tensor | None = None,
    lr: Tensor | None = None,
    config: ApplyConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`apply_damped_inverse` by Triton, whatever the device: three launches.

    Tensors of a trace, which have no addresses, are copied into flat buffers first; then the launches are the same.
    """
    _check(updates, grads, inverse_A, inverse_G, kl_clip, lr)
    lists = (updates, grads, inverse_A, inverse_G)
    if not supports(*lists):
        found = sorted({str(t.dtype) for tensors in lists for t in tensors})
        raise UnsupportedInputError(f"expected tensors of one dtype out of {DTYPES}, got {found}")
    for name, tensors in zip(("updates", "grads", "inverse_A", "inverse_G"), lists, strict=True):
        for index, tensor in enumerate(tensors):
            if tensor.dim() > 1 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise UnsupportedInputError(
                    f"expected contiguous rows, got {name}[{index}] of shape {tuple(tensor.shape)} with strides "
                    f"{tensor.stride()}"
                )
    some = grads[0]
    config = config or _chosen(grads, inverse_A)
    flat = is_traced(some)
    work = (flat_work_of if flat else work_of)(*lists, config.BLOCK)
    bases = [torch.cat([t.reshape(-1) for t in ts]) for ts in lists] if flat else [tensors[0] for tensors in lists]

    transposed = torch.empty(work.workspace, dtype=some.dtype, device=some.device)
    sums = torch.empty((len(work.layer_of), 2), dtype=torch.float32, device=some.device)
    products, squares = (torch.empty(len(grads), dtype=torch.float32, device=some.device) for _ in range(2))
    clip = torch.empty((), dtype=torch.float32, device=some.device)
    has_clip = kl_clip is not None
    limits = (kl_clip, lr) if has_clip else (torch.ones_like(clip),) * 2  # then what the kernel makes of it is not used
    tiling = {
        "FLAT": flat,
        "BLOCK": config.BLOCK,
        "BLOCK_K": config.BLOCK_K,
        "PRECISION": config.input_precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    update, grad, of_a, of_g = bases
    if len(work.first) > 0:
        wrap_triton(first_kernel)[(len(work.first),)](
            work.matrices, work.first, update, grad, of_a, of_g, transposed, sums, **tiling
        )
    if len(work.second) > 0:
        wrap_triton(second_kernel)[(len(work.second),)](
            work.matrices, work.second, update, grad, of_g, transposed, sums, **tiling
        )
    wrap_triton(finish_kernel)[(len(grads) + 1,)](
        *(work.layers, work.layer_of, sums, *limits),
        *(len(work.layer_of), 0 if not has_clip or lr.dim() == 0 else lr.stride(0)),
        *(products, squares, clip),
        BLOCK=1024,
    )
    if flat:
        pieces = update.split([u.numel() for u in updates])
        torch._foreach_copy_(updates, [piece.view(u.shape) for piece, u in zip(pieces, updates, strict=True)])
    return products, squares, clip if has_clip else limits[0]


def _chosen(grads: Sequence[Tensor], inverse_A: Sequence[Tensor]) -> ApplyConfig:
    some, shapes = grads[0], tuple((grad.shape, of_a.dim() > 1) for grad, of_a in zip(grads, inverse_A, strict=True))
    return choose_once(
        "apply_damped_inverse",
        (shapes, some.dtype, some.device),
        lambda: ApplyProblem.of(shapes, some.dtype, device_limits(some.device)),
        default_config,
    )


def _check(
    updates: Sequence[Tensor],
    grads: Sequence[Tensor],
    inverse_A: Sequence[Tensor],
    inverse_G: Sequence[Tensor],
    kl_clip: Tensor | None,
    lr: Tensor | None,
) -> None:
    if not len(updates) == len(grads) == len(inverse_A) == len(inverse_G) or not grads:
        raise UnsupportedInputError(
            f"expected lists of one length, at least 1, got {len(updates)} updates, {len(grads)} grads, "
            f"{len(inverse_A)} inverse_A, {len(inverse_G)} inverse_G"
        )
    if (kl_clip is None) != (lr is None):
        raise UnsupportedInputError("expected both kl_clip and lr, or none of them, got one")
    if kl_clip is not None and (kl_clip.dim() != 0 or lr.shape not in ((), (len(grads),))):
        raise UnsupportedInputError(
            f"expected a 0-dim kl_clip and lr () or ({len(grads)},), got {tuple(kl_clip.shape)}, {tuple(lr.shape)}"
        )
    device = grads[0].device
    for index, (update, grad, of_a, of_g) in enumerate(zip(updates, grads, inverse_A, inverse_G, strict=True)):
        shape, a, g = grad.shape, of_a.shape, of_g.shape
        batch, r, c = (shape[:-2], shape[-2], shape[-1]) if len(shape) in (2, 3) else (shape, -1, -1)
        if update.shape != shape or g != (*batch, r, r) or (a != (0,) and a != (*batch, c, c)):
            raise UnsupportedInputError(
                "expected update and grad (r, c) or (b, r, c), inverse_A (c, c) or (b, c, c) or (0,) and inverse_G "
                f"(r, r) or (b, r, r) at place {index}, got {tuple(update.shape)}, {tuple(shape)}, {tuple(a)} and "
                f"{tuple(g)}"
            )
        if not device == update.device == grad.device == of_a.device == of_g.device:
            raise UnsupportedInputError(
                f"expected tensors on {device}, got at place {index} {update.device}, {grad.device}, {of_a.device} and "
                f"{of_g.device}"
            )


@triton_op("triton_curv::apply_damped_inverse", mutates_args={"updates"})
def _apply_damped_inverse_op(
    updates: list[Tensor],
    grads: list[Tensor],
    inverse_A: list[Tensor],
    inverse_G: list[Tensor],
    kl_clip: Tensor | None = None,
    lr: Tensor | None = None,
    config: list[int] | None = None,
    tables: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (updates, grads, inverse_A, inverse_G, kl_clip, lr)
    if use_reference(grads[0]) or not supports(updates, grads, inverse_A, inverse_G):
        _check(*arguments)
        return apply_damped_inverse_reference(*arguments)
    return launch_apply_damped_inverse(*arguments, None if config is None else ApplyConfig.from_ints(config))


def apply_damped_inverse(
    updates: Sequence[Tensor],
    grads: Sequence[Tensor],
    inverse_A: Sequence[Tensor],
    inverse_G: Sequence[Tensor],
    kl_clip: Tensor | None = None,
    lr: Tensor | None = None,
    config: ApplyConfig | None = None,
) -> Applied:
    """`torch.matmul(G @ D, A, out=P)` for all layers, with sums over each layer and the KL-clip factor.

    Args:
        updates: P, written; (r, c) or (b, r, c).
        grads: D, of the same shapes.
        inverse_A: symmetric, (c, c) or (b, c, c), or of size (0,) where P = G^-1 D.
        inverse_G: symmetric, (r, r) or (b, r, r).
        kl_clip: 0-dim, on the device; None: nothing is clipped.
        lr: 0-dim or (layers,), on the device; given with `kl_clip`.
        config: tiling of the Triton kernels; None means the tuner's choice, `default_config` without one.

    Returns:
        products <P, D> (layers,), squares ||P||^2 (layers,), clip () = min(1, sqrt(kl_clip / sum lr^2 <P, D>)) or 1.
        The updates themselves are not scaled.

    Raises:
        UnsupportedInputError: lists or shapes that do not match, no layers, or rows that are not contiguous.

    """
    arguments = (updates, grads, inverse_A, inverse_G, kl_clip, lr)
    if not torch.compiler.is_compiling() and (not grads or use_reference(grads[0])):
        _check(*arguments)
        return Applied(*apply_damped_inverse_reference(*arguments))
    ints = None if config is None else config.to_ints()
    return Applied(*torch.ops.triton_curv.apply_damped_inverse(*arguments, ints, tables_key()))
