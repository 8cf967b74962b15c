"""One step of the Neumann optimizer for one parameter group, as a function of tensors: what its graphs are made of."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from triton_curv_kernels.neumann import neumann_update_

Phase = Literal["warmup", "reset", "main"]
Gradients = list[Tensor | None]
SLOTS = ("lr", "mu", "alpha", "beta_n", "gamma", "weight_decay")
OF_UPDATE = 5
LR, WEIGHT_DECAY = SLOTS.index("lr"), SLOTS.index("weight_decay")


@dataclass
class Plan:
    """What the next step of a group is, as far as a graph is guarded on it; `fresh`: v starts at the weights."""

    fresh: bool = True
    phase: Phase = "warmup"
    decays: bool = False
    maximize: bool = False

    def key(self) -> Hashable:
        """All of it, as a key."""
        return self.fresh, self.phase, self.decays, self.maximize


class GroupTensors(NamedTuple):
    """All parameters of a group, their m and v, and D = ||w - v||_2, (1,).

    D is no 0-dim tensor here: torch 2.13 takes those of float64 on CPU for numbers, and a graph that writes one writes
    nothing.
    """

    params: list[Tensor]
    momentum_buffers: list[Tensor]
    exp_avgs: list[Tensor]
    distance: Tensor


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements of all tensors together."""
    length: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
    return length


def gradients_of(groups: Sequence[GroupTensors]) -> list[Gradients]:
    """The gradients of the parameters of each group."""
    return [[p.grad for p in group.params] for group in groups]


def step_group_(group: GroupTensors, found: Gradients, plan: Plan, distance: Tensor | None, hyper: Tensor) -> None:
    """Lines 2 to 12 of Algorithm 2; `distance` is D over all groups, if there are others, `hyper` a row of `SLOTS`."""
    moving = [i for i, grad in enumerate(found) if grad is not None]
    if not moving:
        return
    params = [group.params[i] for i in moving]
    momentum_buffers, exp_avgs = [group.momentum_buffers[i] for i in moving], [group.exp_avgs[i] for i in moving]
    grads = [grad for grad in found if grad is not None]
    if plan.maximize:
        grads = list(torch._foreach_neg(grads))
    if plan.decays:
        grads = list(torch._foreach_add(grads, torch._foreach_mul(params, [hyper[WEIGHT_DECAY]] * len(params))))
    if plan.fresh:
        torch._foreach_copy_(group.exp_avgs, group.params)
    if plan.phase != "main":
        wide = [g.to(m.dtype) for g, m in zip(grads, momentum_buffers, strict=True)]
        descent = torch._foreach_mul(wide, [-hyper[LR]] * len(wide))
        if plan.phase == "reset":
            torch._foreach_copy_(momentum_buffers, descent)
        else:
            torch._foreach_add_(params, descent)
        group.distance.copy_(norm(torch._foreach_sub(group.params, group.exp_avgs)))
        return
    if distance is not None:
        group.distance.copy_(distance)
    neumann_update_(params, momentum_buffers, exp_avgs, grads, group.distance[0], hyper[:OF_UPDATE])
    still = [i for i, grad in enumerate(found) if grad is None]
    if still:
        rest = torch._foreach_sub([group.params[i] for i in still], [group.exp_avgs[i] for i in still])
        group.distance.copy_(torch.hypot(group.distance, norm(rest)))


def step_groups_(
    groups: Sequence[GroupTensors], grads: Sequence[Gradients], plans: Sequence[Plan], rows: Tensor
) -> None:
    """`step_group_` of every group, with D as it was before."""
    distance = norm([group.distance for group in groups]) if len(groups) > 1 else None
    for group, found, plan, hyper in zip(groups, grads, plans, rows.unbind(), strict=True):
        step_group_(group, found, plan, distance, hyper)
