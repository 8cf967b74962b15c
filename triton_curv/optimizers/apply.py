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
from triton_curv.optimizers.host_moves import HostMove, all_finite, moves_on_host, moves_on_host_
from triton_curv.optimizers.hyper import corrected, corrected_numbers
from triton_curv.optimizers.hyper_slots import OF_UPDATE, SLOT
from triton_curv.optimizers.kfac_options import KFACOptions
from triton_curv.optimizers.matrices import Lists
from triton_curv.optimizers.step_size import Sizes, agreement, rescale_, scales
from triton_curv_kernels import momentum_update_


class Work(NamedTuple):
    """One parameter group in one step: its buffers, the gradients that backward left, its hyper-parameters."""

    lists: Lists
    grads: list[Tensor]
    hyper: Tensor


def apply_(
    work: Sequence[Work],
    loose: Sequence[Loose],
    steps: Tensor,
    samples: Tensor,
    skipped: Tensor,
    options: KFACOptions,
    exchange: Exchange,
) -> Tensor:
    """P = G^-1 D A^-1 for every block, its size, momentum, decay, update; `fallback` for parameters without a block.

    Where a gradient is not finite nothing changes but the count `skipped`. `steps` (1,) counts the
    step either way. Returns whether all are finite, ().
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
    if moves_on_host(every, steps, options):
        finite = _move_on_host_(work, norms, of_loose, steps, skipped, options, exchange)
    else:
        finite = _move_(work, norms, of_loose, sums, steps, skipped, options, exchange)
    if options.rescale != "none":
        fans = [(p, d) for each in work for p, d in zip(each.lists.params, each.lists.fans_out, strict=True) if d]
        rescale_(fans, options.rescale, finite, exchange.whole_norms)
    for group in loose:
        FALLBACKS[options.fallback].update(group, finite)
    steps.add_(1)
    return finite


def _move_(
    work: Sequence[Work],
    norms: Sequence[Tensor],
    of_loose: Sequence[Tensor],
    sums: Sequence[Sums | None],
    steps: Tensor,
    skipped: Tensor,
    options: KFACOptions,
    exchange: Exchange,
) -> Tensor:
    """All groups with blocks, given norms of their updates and of other gradients; whether these are finite, ()."""
    finite = exchange.agreed(torch.cat([*norms, *of_loose, steps.new_zeros(1)]).sum().isfinite())
    healthy = known_true(finite)
    if not healthy:
        skipped.add_(~finite)
    work = [each._replace(hyper=corrected(each.hyper, steps, options.nesterov)) for each in work]
    every = [each.lists for each in work]
    sizes = [Sizes(each.lists.root_sizes, each.lists.fan_scales, each.hyper) for each in work]
    matched = options.update_size == "matched" and work
    agreed = agreement(sizes, exchange.momentum_norms(every), options) if matched else None
    of_blocks = scales(sizes, norms, lambda: exchange.products(every, sums), options)
    for each, scale in zip(work, of_blocks, strict=True):
        move_(each, scale, agreed, None if healthy else finite)
    return finite


def _move_on_host_(
    work: Sequence[Work],
    norms: Sequence[Tensor],
    of_loose: Sequence[Tensor],
    steps: Tensor,
    skipped: Tensor,
    options: KFACOptions,
    exchange: Exchange,
) -> Tensor:
    """The same where `moves_on_host`."""
    numbers = [norm.tolist() for norm in norms]
    finite = exchange.agreed(all_finite(numbers, of_loose))
    if not finite:
        skipped.add_(1)
        return finite
    past = float(steps)
    moves = [HostMove(each.lists, corrected_numbers(each.hyper.tolist(), past, options.nesterov)) for each in work]
    of_momenta = None
    if options.update_size == "matched":
        of_momenta = [norm.tolist() for norm in exchange.momentum_norms([each.lists for each in work])]
    moves_on_host_(moves, numbers, of_momenta, options)
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
