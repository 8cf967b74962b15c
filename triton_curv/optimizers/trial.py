"""Did the step keep what the quadratic model promised? The reduction ratio, and the way back if it did not."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from triton_curv.blocks import Block
from triton_curv.inverse import damp_
from triton_curv.packing import unpack

Evaluate = Callable[[], Tensor]


@torch.no_grad()
def evaluated(model: nn.Module, evaluate: Evaluate, seed: int) -> Tensor:
    """The loss under one random state each time; buffers (running statistics) and random states stay as they were."""
    buffers = [b for b in model.buffers() if b is not None]
    kept = [b.clone() for b in buffers]
    devices = sorted({b.device.index or 0 for b in model.parameters() if b.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        loss = evaluate()
    for buffer, old in zip(buffers, kept, strict=True):
        buffer.copy_(old)
    return loss.detach()


def _blockwise(factors: Sequence[Tensor], matrix: Tensor) -> Tensor:
    """diag(F_1, F_2, ...) @ D of D (batch, rows, columns), factors (batch * count, n, n)."""
    batch, parts, start = len(matrix), [], 0
    for factor in factors:
        count, n = len(factor) // batch, factor.shape[-1]
        part = matrix[:, start : start + count * n].reshape(batch, count, n, -1)
        parts.append((factor.view(batch, count, n, n) @ part).reshape(batch, count * n, -1))
        start += count * n
    return torch.cat(parts, dim=1)


def damped_product(block: Block, matrix: Tensor) -> Tensor:
    """(G + s_G I) D (A + s_A I), G D A + lambda D in an eigenbasis, (F + lambda I) D: D (batch, rows, columns)."""
    store = block.store
    sides: dict[bool, list[Tensor]] = {False: [], True: []}
    in_basis = block.gains is not None
    for name, key in block.keys.items():
        n = store.view("inverses", key).shape[-1]
        factor = unpack(store.packed(key).view(-1, n * (n + 1) // 2), n)
        if not in_basis:
            damp_(factor, store.shifts[store.rows(key)])
        sides[name[0] == "A"].append(factor)
    product = _blockwise(sides[False], matrix)
    if sides[True]:
        product = _blockwise(sides[True], product.mT).mT
    if in_basis:
        product = product + store.shifts[store.rows(block.keys["A"])][:, None, None] * matrix
    return product


class Before(NamedTuple):
    """What a step starts from: the loss, and copies of everything it will change."""

    loss: Tensor
    tensors: list[Tensor]
    copies: list[Tensor]
    params: list[Parameter]
    weights: list[Tensor]

    @classmethod
    def of(cls, loss: Tensor, params: Iterable[Parameter], state: Iterable[Tensor]) -> "Before":
        """Copies of parameters and of the state that a step changes."""
        params = list(params)
        tensors = [*params, *state]
        copies = [t.detach().clone() for t in tensors]
        return cls(loss.detach(), list(tensors), copies, params, copies[: len(params)])

    def restore_(self, where: Tensor) -> None:
        """Put everything back where the flag () is True, without a look at it."""
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            tensor.copy_(torch.where(where.to(tensor.device), copy, tensor))


def predicted_change(
    blocks: Iterable[Block],
    before: Before,
    scale: float,
    curvature_scale: Tensor | float,
    total: Callable[[Tensor], Tensor],
) -> Tensor:
    """g.d + d.(F + lambda I)d / 2 of the step d that was taken; g = p.grad / scale, F in units of the mean loss.

    Parameters without a block count with g.d alone. `total` adds up what ranks know of their own `blocks`.
    """
    moved = {p: p.detach() - old for p, old in zip(before.params, before.weights, strict=True)}
    linear = [torch.sum(p.grad * d) for p, d in moved.items() if p.grad is not None]
    change = torch.stack([term.to(before.loss.dtype) for term in linear]).sum() / scale
    curved = torch.zeros_like(change)
    for block in blocks:
        if not all(p in moved for p in block.rule.params.values()):
            continue
        some = next(iter(block.sums.values()))
        matrix = torch.zeros(block.rule.matrix_shape, dtype=some.dtype, device=some.device)
        for name, part in block.rule.views(matrix).items():
            part.copy_(moved[block.rule.params[name]])
        curved = curved + 0.5 * curvature_scale * torch.sum(matrix * damped_product(block, matrix)).to(change.dtype)
    return change + total(curved)


def reduction_ratio(before: Tensor, after: Tensor, predicted: Tensor) -> Tensor:
    """(after - before) / predicted; NaN, which no rule takes for a success, where no reduction was predicted."""
    return torch.where(predicted < 0, (after - before) / predicted, torch.nan)
