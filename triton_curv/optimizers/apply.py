"""Region 3 of a step of KFAC, from gradients to new weights, as functions of tensor lists."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_curv.blocks.operator import Sums, solve_all, solving_cost
from triton_curv.costs import NOTHING, Cost, update_cost
from triton_curv.hostcheck import known_true
from triton_curv.nvtx import stage
from triton_curv.optimizers.exchange import Exchange
from triton_curv.optimizers.fallback import FALLBACKS, Loose
from triton_curv.optimizers.hyper_slots import OF_UPDATE, SLOT
from triton_curv.optimizers.kfac_options import KFACOptions, Rescale
from triton_curv.optimizers.matrices import Lists
from triton_curv_kernels import momentum_update_

RESCALE_EPS = 1e-9


class Work(NamedTuple):
    """One parameter group in one step: its buffers, the gradients that backward left, its hyper-parameters."""

    lists: Lists
    grads: list[Tensor]
    hyper: Tensor


def apply_(
    work: Sequence[Work],
    loose: Sequence[Loose],
    samples: Tensor,
    skipped: Tensor,
    options: KFACOptions,
    exchange: Exchange,
) -> Tensor:
    """P = G^-1 D A^-1 for every block, its size, momentum, decay, update; `fallback` for parameters without a block.

    Where a gradient is not finite nothing changes but the count `skipped`. Returns whether all are finite, ().
    """
    every = [each.lists for each in work]
    for lists in every:
        for buffer in lists.stale:
            buffer.zero_()
    exchange.matrices_(every, [each.grads for each in work])
    sums = [precondition(lists, samples, options, exchange.applied(lists.block_indices)) for lists in every]
    exchange.updates_(every)
    norms = exchange.norms(every, sums)
    of_loose = [torch.stack(torch._foreach_norm(each.grads, 2, samples.dtype)) for each in loose]  # fp16 ends at 65504
    finite = exchange.agreed(torch.cat([*norms, *of_loose, samples.new_zeros(1)]).sum().isfinite())
    healthy = known_true(finite)
    if not healthy:
        skipped.add_(~finite)
    agreed = agreement(work, options, exchange)
    for each, scale in zip(work, scales(work, norms, sums, options, exchange), strict=True):
        move_(each, scale, agreed, None if healthy else finite)
    if options.rescale != "none":
        fans = [(p, d) for each in work for p, d in zip(each.lists.params, each.lists.fans_out, strict=True) if d]
        rescale_(fans, options.rescale, finite, exchange)
    for group in loose:
        FALLBACKS[options.fallback].update(group, finite)
    return finite


@stage("apply", payload=lambda lists, samples, options, applied: _cost_of_solving(lists, applied))
def precondition(lists: Lists, samples: Tensor, options: KFACOptions, applied: Sequence[bool]) -> Sums | None:
    """From gradients to the steps of all blocks of a group, of whatever size they come out; their sums, if known."""
    if options.reduction == "sum":
        torch._foreach_div_(lists.row_grads, [samples[index] for index in lists.block_indices])
    if options.loss_scale != 1.0:
        torch._foreach_div_(lists.row_grads, options.loss_scale)
    if all(applied):
        return solve_all(lists.operators, lists.row_grads, lists.row_updates)
    here = [i for i, is_here in enumerate(applied) if is_here]
    operators, grads = [lists.operators[i] for i in here], [lists.row_grads[i] for i in here]
    solve_all(operators, grads, [lists.row_updates[i] for i in here])
    return None


def targets(lists: Lists, options: KFACOptions) -> Tensor:
    """Norms of the blocks' steps before averaging: root mean square 1 for "rms", sqrt(64 / inputs) for "matched"."""
    return lists.root_sizes if options.update_size == "rms" else lists.root_sizes * lists.fan_scales


def smallest(lists: Lists) -> Tensor:
    """Norm of each block's step if every number's square were the smallest normal one."""
    least: float = torch.finfo(lists.root_sizes.dtype).tiny ** 0.5
    return lists.root_sizes * least


def agreement(work: Sequence[Work], options: KFACOptions, exchange: Exchange) -> Tensor | None:
    """How far the last steps agree, in (0, 1], (): what "matched" multiplies lr with.

    The norm of their average over the mean of their norms, averaged over blocks: 1 where all point the same way, and
    sqrt((1 - momentum)/(1 + momentum)) where all are noise. Steps get shorter by themselves where they begin to fight
    one another, as at the end of training, which lets lr be large. From the momentum that the last step left.
    """
    if options.update_size != "matched" or not work:
        return None
    norms = exchange.momentum_norms([each.lists for each in work])
    ratios = [
        norm / (targets(each.lists, options) * each.hyper[SLOT["settled"]])
        for each, norm in zip(work, norms, strict=True)
    ]
    mean = torch.cat(ratios).mean().clamp_max(1.0)
    return torch.where(mean > 0, mean, 1.0)  # before the first step there is no momentum: 0 / 0


def _cost_of_solving(lists: Lists, applied: Sequence[bool]) -> Cost:
    rows = zip(lists.operators, lists.row_grads, applied, strict=True)
    return sum((solving_cost(operator, grad) for operator, grad, is_here in rows if is_here), NOTHING)


@stage("update", payload=lambda work, scale, agreed, happens: update_cost(work.lists.flat_updates.numel()))
def move_(work: Work, scale: Tensor, agreed: Tensor | None, happens: Tensor | None) -> None:
    """Momentum, decay and update of one parameter group, lr times `agreed`; nothing where `happens` is False."""
    lists, hyper = work.lists, work.hyper[:OF_UPDATE]
    if agreed is not None:
        hyper = torch.cat([hyper[:1] * agreed, hyper[1:2], hyper[2:3] / agreed, hyper[3:]])
    if happens is not None:
        lists.flat_updates.masked_fill_(~happens, 0.0)
        scale = torch.where(happens, scale, 0.0)
        hyper = torch.where(happens, hyper, lists.idle)
    of_row = (scale * work.hyper[SLOT["sign"]]).unbind()
    of_param = [of_row[row] for row in lists.row_of_param]
    momentum_update_(lists.params, lists.momenta, lists.updates, of_param, hyper)


def scales(
    work: Sequence[Work],
    norms: Sequence[Tensor],
    sums: Sequence[Sums | None],
    options: KFACOptions,
    exchange: Exchange,
) -> list[Tensor]:
    """What each block's update is multiplied with on its way into the momentum, one vector for each group."""
    if options.averages:  # the momentum is an average, hence 1 - momentum
        # numbers whose squares underflow have a norm of 0: their steps stay short, instead of becoming huge
        return [
            targets(each.lists, options) * each.hyper[SLOT["average"]] / torch.maximum(n, smallest(each.lists))
            for each, n in zip(work, norms, strict=True)
        ]
    if options.update_size == "none" or not work:
        return [torch.ones_like(n) for n in norms]
    pairs = zip(work, exchange.products([each.lists for each in work], sums), strict=True)
    products = [product * each.hyper[SLOT["lr_squared"]] for each, product in pairs]
    nu = torch.sqrt(options.kl_clip / torch.stack(products).sum().clamp_min(1e-30)).clamp_max(1.0)
    return [nu.expand_as(n) for n in norms]


def rescale_(weights: Sequence[tuple[Tensor, int]], how: Rescale, happens: Tensor, exchange: Exchange) -> None:
    """w <- sqrt(2 d_out) w / (||w|| + 1e-9) of pairs (w, d_out); "code" only shrinks (arXiv 2002.06015 eq. 24)."""
    if how == "none" or not weights:
        return
    tensors = [w for w, _ in weights]
    norms = exchange.whole_norms(torch.stack(torch._foreach_norm(tensors)))
    targets = torch.tensor([(2.0 * d) ** 0.5 for _, d in weights], dtype=norms.dtype, device=norms.device)
    factors = targets / (norms + RESCALE_EPS)
    if how == "code":
        factors = factors.clamp_max(1.0)
    torch._foreach_mul_(tensors, list(torch.where(happens, factors, 1.0).unbind()))
