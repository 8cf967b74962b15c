"""How long the steps of blocks are, from norms: as functions of vectors over the blocks of each parameter group."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_curv.optimizers.hyper_slots import SLOT
from triton_curv.optimizers.kfac_options import KFACOptions, Rescale

RESCALE_EPS = 1e-9


class Sizes(NamedTuple):
    """sqrt(numbers) and `fan_scale` of each block of a group, and the group's hyper-parameters."""

    root_sizes: Tensor
    fan_scales: Tensor
    hyper: Tensor


def targets(sizes: Sizes, options: KFACOptions) -> Tensor:
    """Norms of the blocks' steps before averaging: root mean square 1 for "rms", sqrt(64 / inputs) for "matched"."""
    return sizes.root_sizes if options.update_size == "rms" else sizes.root_sizes * sizes.fan_scales


def smallest(root_sizes: Tensor) -> Tensor:
    """Norm of each block's step if every number's square were the smallest normal one."""
    least: float = torch.finfo(root_sizes.dtype).tiny ** 0.5
    return root_sizes * least


def agreement(every: Sequence[Sizes], momentum_norms: Sequence[Tensor], options: KFACOptions) -> Tensor:
    """How far the last steps agree, in (0, 1], (): what "matched" multiplies lr with.

    The norm of their average over the mean of their norms, averaged over blocks: 1 where all point the same way, and
    sqrt((1 - momentum)/(1 + momentum)) where all are noise. Steps get shorter by themselves where they begin to fight
    one another, as at the end of training, which lets lr be large. From the momentum that the last step left.
    """
    ratios = [
        norm / (targets(sizes, options) * sizes.hyper[SLOT["settled"]])
        for sizes, norm in zip(every, momentum_norms, strict=True)
    ]
    mean = torch.cat(ratios).mean().clamp_max(1.0)
    return torch.where(mean > 0, mean, 1.0)  # before the first step there is no momentum: 0 / 0


def scales(
    every: Sequence[Sizes],
    norms: Sequence[Tensor],
    products: Callable[[], Sequence[Tensor]],
    options: KFACOptions,
) -> list[Tensor]:
    """What each block's update is multiplied with on its way into the momentum, one vector for each group.

    `products`: <P, D> over all blocks of each group, which only KL clipping asks for.
    """
    if options.averages:  # the momentum is an average, hence 1 - momentum
        # numbers whose squares underflow have a norm of 0: their steps stay short, instead of becoming huge
        return [
            targets(sizes, options) * sizes.hyper[SLOT["average"]] / torch.maximum(n, smallest(sizes.root_sizes))
            for sizes, n in zip(every, norms, strict=True)
        ]
    if options.update_size == "none" or not every:
        return [torch.ones_like(n) for n in norms]
    squared = [p * sizes.hyper[SLOT["lr_squared"]] for sizes, p in zip(every, products(), strict=True)]
    nu = torch.sqrt(options.kl_clip / torch.stack(squared).sum().clamp_min(1e-30)).clamp_max(1.0)
    return [nu.expand_as(n) for n in norms]


def rescale_(
    weights: Sequence[tuple[Tensor, int]], how: Rescale, happens: Tensor, whole_norms: Callable[[Tensor], Tensor]
) -> None:
    """w <- sqrt(2 d_out) w / (||w|| + 1e-9) of pairs (w, d_out); "code" only shrinks (arXiv 2002.06015 eq. 24).

    `whole_norms` makes norms of weights out of those of what lies here.
    """
    if how == "none" or not weights:
        return
    tensors = [w for w, _ in weights]
    norms = whole_norms(torch.stack(torch._foreach_norm(tensors)))
    inverse = (norms + RESCALE_EPS).reciprocal().unbind()
    # lengths as numbers: a tensor of them would be copied to a GPU at each step, and waited for
    factors = torch.stack(torch._foreach_mul(inverse, [(2.0 * d) ** 0.5 for _, d in weights]))
    if how == "code":
        factors = factors.clamp_max(1.0)
    torch._foreach_mul_(tensors, list(torch.where(happens, factors, 1.0).unbind()))
