"""Region 3 of a step of KFAC in a graph of torch.compile: gradients to new weights, without buffers in between.

What `apply.py` does with flat buffers and multi-tensor calls, each a pass over memory, is here written as expressions,
which a compiler fuses: a block's gradient is read once, its momentum and weights are read and written once.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from triton_curv.blocks.operator import Operator, has_kernels, solve_all, solved
from triton_curv.optimizers.fallback import FALLBACKS, Loose
from triton_curv.optimizers.hyper import corrected
from triton_curv.optimizers.hyper_slots import OF_UPDATE, SLOT
from triton_curv.optimizers.kfac_options import KFACOptions
from triton_curv.optimizers.step_size import Sizes, agreement, rescale_, scales
from triton_curv_kernels import momentum_update_


class Layout(Protocol):
    """How a block's parameters lie in its matrix."""

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parts of a (batch, rows, columns) matrix that belong to each parameter, in the parameter's shape."""


class GraphRow(NamedTuple):
    """One block: its damped inverses, momentum (batch, rows, columns), parameters and place among all blocks.

    `whole`: its only parameter is the matrix, in another shape. `fans_out`: see `Part`.
    """

    operator: Operator
    momentum: Tensor
    layout: Layout
    params: list[Parameter]
    whole: bool
    number: int
    fans_out: list[int]


class GraphWork(NamedTuple):
    """One parameter group in one step: its blocks, their gradients, their sizes and its hyper-parameters."""

    rows: list[GraphRow]
    grads: list[Tensor]
    sizes: Sizes
    idle: Tensor  # hyper-parameters of a step that changes nothing: see `momentum_update_`


def apply_in_graph_(
    work: Sequence[GraphWork],
    loose: Sequence[Loose],
    steps: Tensor,
    samples: Tensor,
    skipped: Tensor,
    options: KFACOptions,
) -> Tensor:
    """`apply_` of one rank; returns whether all gradients are finite, ()."""
    work = [each._replace(sizes=_corrected(each.sizes, steps, options)) for each in work]
    matrices = [_matrices(each, samples, options) for each in work]
    updates = [_solved(each, given) for each, given in zip(work, matrices, strict=True)]
    norms = [torch.stack([torch.linalg.vector_norm(u) for u in of_group]) for of_group in updates]
    of_loose = [torch.linalg.vector_norm(g, dtype=samples.dtype) for each in loose for g in each.grads]
    finite = torch.cat([*norms, torch.stack([*of_loose, samples.new_zeros(())])]).sum().isfinite()
    skipped.add_(~finite)

    sizes = [each.sizes for each in work]
    agreed = None
    if options.update_size == "matched" and work:
        of_momenta = [torch.stack([torch.linalg.vector_norm(row.momentum) for row in each.rows]) for each in work]
        agreed = agreement(sizes, of_momenta, options)
    of_blocks = scales(sizes, norms, lambda: [_product(u, d) for u, d in zip(updates, matrices, strict=True)], options)
    for each, scale, update in zip(work, of_blocks, updates, strict=True):
        _move_(each, scale, update, agreed, finite)
    if options.rescale != "none":
        rows = [row for each in work for row in each.rows]
        fans = [(p, d) for row in rows for p, d in zip(row.params, row.fans_out, strict=True) if d]
        rescale_(fans, options.rescale, finite, lambda norms: norms)
    for group in loose:
        FALLBACKS[options.fallback].update(group, finite)
    steps.add_(1)
    return finite


def _corrected(sizes: Sizes, steps: Tensor, options: KFACOptions) -> Sizes:
    return sizes._replace(hyper=corrected(sizes.hyper, steps, options.nesterov))


def _matrices(work: GraphWork, samples: Tensor, options: KFACOptions) -> list[Tensor]:
    """D of each block, from the gradients of its parameters."""
    matrices, first = [], 0
    for row in work.rows:
        grads = work.grads[first : first + len(row.params)]
        first += len(grads)
        if row.whole:
            matrix = grads[0].reshape(row.momentum.shape).to(row.momentum.dtype)
        else:
            matrix = torch.zeros_like(row.momentum)
            for part, grad in zip(_parts(row, matrix), grads, strict=True):
                part.copy_(grad)
        if options.reduction == "sum":
            matrix = matrix / samples[row.number]
        if options.loss_scale != 1.0:
            matrix = matrix / options.loss_scale
        matrices.append(matrix)
    return matrices


def _parts(row: GraphRow, matrix: Tensor) -> list[Tensor]:
    if row.whole:  # a graph that asks the layout is guarded on all that it looks at
        return [matrix.reshape(row.params[0].shape)]
    parts: Mapping[str, Tensor] = row.layout.views(matrix)
    return list(parts.values())


def _solved(work: GraphWork, matrices: list[Tensor]) -> list[Tensor]:
    """P = G^-1 D A^-1 of each block: by kernels, in three launches, where there are any."""
    if not matrices or not has_kernels(matrices[0]):
        return [solved(row.operator, matrix) for row, matrix in zip(work.rows, matrices, strict=True)]
    outs = [torch.empty_like(matrix) for matrix in matrices]
    solve_all([row.operator for row in work.rows], [matrix.contiguous() for matrix in matrices], outs)
    return outs


def _product(updates: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
    """<P, D> over all blocks, ()."""
    return torch.stack([(p * d).sum() for p, d in zip(updates, matrices, strict=True)]).sum()


def _move_(work: GraphWork, scale: Tensor, updates: list[Tensor], agreed: Tensor | None, happens: Tensor) -> None:
    """Momentum, decay and update of one parameter group, lr times `agreed`; nothing where `happens` is False."""
    hyper = work.sizes.hyper[:OF_UPDATE]
    if agreed is not None:
        hyper = torch.cat([hyper[:1] * agreed, hyper[1:2], hyper[2:3] / agreed, hyper[3:]])
    hyper = torch.where(happens, hyper, work.idle)
    of_row = (torch.where(happens, scale, 0.0) * work.sizes.hyper[SLOT["sign"]]).unbind()
    updates = [torch.where(happens, update, 0.0) for update in updates]
    if has_kernels(hyper):
        params = [p for row in work.rows for p in row.params]
        momenta = [part for row in work.rows for part in _parts(row, row.momentum)]
        parts = [part for row, update in zip(work.rows, updates, strict=True) for part in _parts(row, update)]
        of_param = [s for row, s in zip(work.rows, of_row, strict=True) for _ in row.params]
        momentum_update_(params, momenta, parts, of_param, hyper)
        return
    lr, momentum, weight_decay, momentum_weight, update_weight = hyper.unbind()
    for row, s, update in zip(work.rows, of_row, updates, strict=True):
        averaged = momentum * row.momentum + s * update
        step = lr * (momentum_weight * averaged + update_weight * s * update)
        for p, part in zip(row.params, _parts(row, step), strict=True):
            p.copy_((1 - lr * weight_decay) * p.to(step.dtype) - part)
        row.momentum.copy_(averaged)
