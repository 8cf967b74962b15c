"""Curvature of a layer of which only its forward is known, registered by a user: by differentiating it alone.

Where one position of the output is a linear map of something that the layer makes of its input, the gradient of one
position's loss is an outer product g a^T, which tells both. A bias tells their lengths; without one g is as long as the
gradient at the output.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from triton_curv.blocks import Rule
from triton_curv.verification.kronecker import Rows
from triton_curv.verification.seen import Seen

MOST_POSITIONS = 8192
OUTER = 1e-8
"""Second singular value of an outer product, relative to its first."""


class Layer:
    """A layer's output as a function of its parameters, at what one call saw."""

    def __init__(self, module: nn.Module, rule: Rule, call: Seen) -> None:
        with torch.enable_grad():
            self.output: Tensor = module(*call.args, **call.kwargs)
        self.rule = rule
        self.params = dict(rule.params)
        self.repeats = torch.allclose(self.output, call.output, rtol=1e-10, atol=1e-12)

    def matrix(self, cotangent: Tensor) -> Tensor:
        """The gradient (groups, rows, columns) for one at the output, as the rule lays it out."""
        grads = torch.autograd.grad(self.output, list(self.params.values()), cotangent, retain_graph=True)
        return laid_out(self.rule, dict(zip(self.params, grads, strict=True)))


def laid_out(rule: Rule, values: Mapping[str, Tensor]) -> Tensor:
    """Gradients as the matrix (groups, rows, columns) of which the rule's views are theirs."""
    matrix = next(iter(values.values())).new_zeros(rule.matrix_shape)
    for name, part in rule.views(matrix).items():
        part.copy_(values[name])
    return matrix


def rows_by_autograd(module: nn.Module, rule: Rule, call: Seen) -> Rows | str:
    """a and g of one call, or why they are not known."""
    layer = Layer(module, rule, call)
    if not layer.repeats:
        return "called again its output differs: no definition to compare"
    groups, rows, columns = rule.matrix_shape
    shape, features = layer.output.shape, groups * rows
    axis = len(shape) - 1 if shape[-1] == features else 1
    if shape[axis] != features:
        return f"no dimension of its output has {features} features: no definition to compare"
    places = list(product(*(range(size) for i, size in enumerate(shape) if i != axis)))
    if len(places) > MOST_POSITIONS:
        return f"more than {MOST_POSITIONS} positions: no definition to compare"
    bias = _bias_column(rule)
    direction = torch.randn(features, dtype=call.grad.dtype, generator=torch.Generator().manual_seed(0))
    inputs, signals = [], []
    for place in places:
        at: Any = (*place[:axis], slice(None), *place[axis:])
        told = [torch.zeros_like(call.grad) for _ in range(2)]
        told[0][at], told[1][at] = direction, call.grad[at]
        probe, gradient = layer.matrix(told[0]), layer.matrix(told[1])
        _, sizes, right = torch.linalg.svd(probe, full_matrices=False)
        if bool((sizes[:, 1:] > OUTER * sizes[:, :1]).any()):
            return "its gradient at one position is no outer product: no definition to compare"
        a = right[:, 0] * (sizes[:, 0] / direction.view(groups, rows).norm(dim=1))[:, None]
        if bias is not None:
            a = a / a[:, bias : bias + 1]
        inputs.append(a)
        signals.append((gradient @ a[..., None])[..., 0] / a.square().sum(1).clamp_min(1e-300)[:, None])
    samples = shape[0]
    return Rows(
        torch.stack(inputs).reshape(samples, -1, groups, columns),
        torch.stack(signals).reshape(samples, -1, groups, rows),
    )


def _bias_column(rule: Rule) -> int | None:
    """The column of D that is the bias; None without one."""
    if "bias" not in rule.params:
        return None
    groups, rows, columns = rule.matrix_shape
    where = torch.arange(groups * rows * columns).reshape(rule.matrix_shape)
    found = set((rule.views(where)["bias"] % columns).flatten().tolist())
    return found.pop() if len(found) == 1 else None


def sample_gradients(module: nn.Module, rule: Rule, call: Seen) -> Tensor | str:
    """h_n, the part of the mean loss's gradient that comes through sample n of one call, (N, groups, rows, columns)."""
    layer = Layer(module, rule, call)
    if not layer.repeats:
        return "called again its output differs: no definition to compare"
    parts = []
    for n in range(len(call.grad)):
        alone = torch.zeros_like(call.grad)
        alone[n] = call.grad[n]
        parts.append(layer.matrix(alone))
    return torch.stack(parts)
