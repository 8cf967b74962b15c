"""The arithmetic of a step of KFAC as functions of tensor lists: gradients in, scales and hyper-parameters out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from triton_curv.optimizers.kfac_options import KFACOptions, Rescale
from triton_curv.optimizers.matrices import Lists, MatrixGroup

RESCALE_EPS = 1e-9


class Work(NamedTuple):
    """One parameter group in one step: its settings, its buffers, and the blocks that have gradients."""

    group: dict[str, Any]
    matrices: MatrixGroup
    lists: Lists


def precondition(work: Work, samples: Tensor, options: KFACOptions) -> None:
    """From gradients to the steps of all blocks of a group, of whatever size they come out."""
    lists = work.lists
    torch._foreach_copy_(lists.grads, [cast("Tensor", p.grad) for p in lists.params])
    if options.reduction == "sum":
        torch._foreach_div_(lists.row_grads, [samples[row.block.index] for row in lists.rows])
    if options.loss_scale != 1.0:
        work.matrices.grads.div_(options.loss_scale)
    for row in lists.rows:
        row.block.solve(row.grad, row.update)


def scales(work: Sequence[Work], norms: Sequence[Tensor], options: KFACOptions) -> list[Tensor]:
    """What each block's update is multiplied with on its way into the momentum, one vector for each group."""
    if options.update_size == "rms":  # step of root mean square 1; the momentum is an average, hence 1 - momentum
        return [
            each.lists.root_sizes * (1 - each.group["momentum"]) / n.clamp_min(torch.finfo(n.dtype).tiny)
            for each, n in zip(work, norms, strict=True)
        ]
    if options.update_size == "none" or not work:
        return [torch.ones_like(n) for n in norms]
    products = [torch.dot(each.matrices.updates, each.matrices.grads) * each.group["lr"] ** 2 for each in work]
    nu = torch.sqrt(options.kl_clip / torch.stack(products).sum().clamp_min(1e-30)).clamp_max(1.0)
    return [nu.expand_as(n) for n in norms]


def hyper_vector(group: Mapping[str, Any], steps: int, options: KFACOptions, like: Tensor) -> Tensor:
    """[lr, momentum, weight_decay, weight of the momentum, weight of the update]: see `momentum_update_`."""
    momentum = group["momentum"]
    ahead = (momentum, 1.0) if options.nesterov else (1.0, 0.0)
    bias = 1 - momentum ** (steps + 1 + options.nesterov) if options.update_size == "rms" else 1.0
    values = [group["lr"], momentum, group["weight_decay"], ahead[0] / bias, ahead[1] / bias]
    if any(isinstance(v, Tensor) for v in values):
        return torch.stack([torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in values])
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def rescale_(weights: Sequence[Tensor], how: Rescale, happens: Tensor) -> None:
    """w <- sqrt(2 d_out) w / (||w|| + 1e-9), d_out = w.shape[0]; "code" only shrinks (arXiv 2002.06015 eq. 24)."""
    if how == "none" or not weights:
        return
    norms = torch.stack(torch._foreach_norm(list(weights)))
    targets = torch.tensor([(2.0 * len(w)) ** 0.5 for w in weights], dtype=norms.dtype, device=norms.device)
    factors = targets / (norms + RESCALE_EPS)
    if how == "code":
        factors = factors.clamp_max(1.0)
    torch._foreach_mul_(list(weights), list(torch.where(happens, factors, 1.0).unbind()))
