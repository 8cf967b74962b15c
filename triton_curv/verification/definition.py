"""Curvature of one block by definition, from inputs and output gradients that plain hooks saw; nothing of our blocks.

With a_nt the inputs (patches for a convolution, 1 appended for a bias) and g_nt the gradients of a sample's loss:
A = (1/N) sum_n (1/T) sum_t a a^T, G = (1/N) sum_n sum_t g g^T, F = (1/N) sum_n h h^T with h_n the sample's gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from triton_curv.blocks import Rule, TiedEmbeddingRule
from triton_curv.blocks.kind import layer_kind
from triton_curv.verification.by_autograd import laid_out, rows_by_autograd, sample_gradients
from triton_curv.verification.kronecker import Kronecker, Rows, of_rows, of_shared_tokens, of_tokens, token_rows
from triton_curv.verification.layer_rows import CONVOLUTIONS, LINEAR, linear_rows, matrix_of, rows_of
from triton_curv.verification.seen import ROLES, Calls, Seen

Norm = nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm


@dataclass(frozen=True)
class Definition:
    """Factors of one block, A and G or F, (groups, n, n) or (groups, n) for diagonals.

    `gap` is ||F - its approximation|| / ||F|| for the empirical Fisher F of the block's parameters; None if F is 0.
    `only_product`: A and G are known up to a number that one is multiplied with and the other divided by.
    """

    factors: Mapping[str, Tensor]
    gap: float | None
    only_product: bool = False


def users_of(model: nn.Module, rule: Rule) -> list[nn.Module]:
    """All layers of the model that use a parameter of the block."""
    params = {id(p) for p in rule.params.values()}
    return [m for m in model.modules() if any(id(p) in params for p in m.parameters(recurse=False))]


def is_ours(rule: Rule) -> bool:
    """Whether the rule is none that a user wrote."""
    return type(rule).__module__.startswith("triton_curv.")


def define(rule: Rule, users: Sequence[nn.Module], calls: Calls) -> Definition | str:
    """The curvature of the parameters that `users` share, or why there is no definition of it here."""
    if isinstance(rule.module, nn.MultiheadAttention):
        return _of_projections(rule, calls)
    seen = [(layer, call) for layer in users for call in calls.get((layer, ""), ())]
    if not seen:
        return "its module was not called: nothing to compare"
    samples = len(seen[0][1].inputs)
    if set(rule.factor_shapes) == {"F"}:
        if isinstance(rule.module, Norm) and is_ours(rule):
            return _of_norm(rule.module, [call for _, call in seen])
        return _of_parameters(rule, seen, samples)
    if isinstance(rule, TiedEmbeddingRule):
        tokens = [token_rows(layer, call, samples) for layer, call in seen if layer is rule.module]
        heads = [linear_rows(call.inputs, call.grad, False) for layer, call in seen if layer is not rule.module]
        return _definition(of_shared_tokens([*tokens, *heads], samples))
    if isinstance(rule.module, nn.Embedding) and layer_kind(rule.module) is nn.Embedding and is_ours(rule):
        of_batch = of_tokens(rule.module, [call for _, call in seen], samples)
        if seen[0][1].inputs.dim() < 2 or samples == 1:  # served a whole batch: N is that of the other layers
            others = [len(call.inputs) for (layer, _), own in calls.items() if layer is not rule.module for call in own]
            of_batch = replace(of_batch, G=of_batch.G * max(others, default=samples) / samples)
        return _definition(of_batch)
    rows = [_rows_of(layer, rule, call) for layer, call in seen]
    whole = [r for r in rows if isinstance(r, Rows)]
    if len(whole) < len(rows):
        return next(r for r in rows if isinstance(r, str))
    diagonal = [name for name, shape in rule.factor_shapes.items() if shape.size == 1 and shape.blocks > 1]
    whole_rows = of_rows(whole, samples, diagonal)
    return replace(_definition(whole_rows), only_product=not is_ours(rule) and "bias" not in rule.params)


def _rows_of(layer: nn.Module, rule: Rule, call: Seen) -> Rows | str:
    if is_ours(rule) and layer_kind(layer) in (*LINEAR, *CONVOLUTIONS):
        return rows_of(layer, call, "bias" in rule.params)
    return rows_by_autograd(layer, rule, call)


def _definition(whole: Kronecker) -> Definition:
    return Definition({"A": whole.A, "G": whole.G}, whole.gap())


def _of_projections(rule: Rule, calls: Calls) -> Definition | str:
    """Of an attention's input projections: three linear layers, or one, or their biases."""
    roles = [role for role in ROLES if f"{role}_proj_weight" in rule.params] or ROLES
    seen = [calls.get((rule.module, role), []) for role in roles]
    if not all(seen):
        return "its module was not called: nothing to compare"
    samples = len(seen[0][0].inputs)
    if set(rule.params) == {"in_proj_bias"}:
        sums = torch.stack([torch.stack([call.grad.sum(1) for call in of_role]).sum(0) for of_role in seen], dim=1)
        return _of_gradients(sums[..., None], samples)
    parts = [
        of_rows([linear_rows(call.inputs, call.grad, "in_proj_bias" in rule.params) for call in of_role], samples)
        for of_role in seen
    ]
    A, G = torch.cat([part.A for part in parts]), torch.cat([part.G for part in parts])
    return _definition(Kronecker(A, G, torch.cat([part.gradients for part in parts], dim=1)))


def _of_norm(module: Norm, seen: Sequence[Seen]) -> Definition:
    """F of scale and shift, 2 x 2 for each channel; calls add up as if they were samples of their own."""
    own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    plain = {name: torch.ones_like(p) if name == "weight" else torch.zeros_like(p) for name, p in own.items()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
    gradients = []
    for call in seen:
        with torch.no_grad():
            normalised: Tensor = functional_call(module, {**plain, **buffers}, (call.inputs,))
        parts = []
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                values = call.grad * normalised if name == "weight" else call.grad
                if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                    parts.append(values.reshape(len(values), -1, p.numel()).sum(1))
                else:
                    parts.append(values.reshape(len(values), p.numel(), -1).sum(2))
        gradients.append(torch.stack(parts, dim=-1)[..., None])  # (N, channels, parts, 1)
    return _of_gradients(torch.cat(gradients), len(seen[0].inputs))


def _of_parameters(rule: Rule, seen: Sequence[tuple[nn.Module, Seen]], samples: int) -> Definition | str:
    """F of a layer of which only the forward is known."""
    if rule.matrix_shape[2] != 1:
        return "its F multiplies several columns: no definition to compare"
    found = [sample_gradients(layer, rule, call) for layer, call in seen]
    whole = [gradients for gradients in found if isinstance(gradients, Tensor)]
    if len(whole) < len(found):
        return next(gradients for gradients in found if isinstance(gradients, str))
    return _of_gradients(torch.stack(whole).sum(0), samples)


def _of_gradients(gradients: Tensor, samples: int) -> Definition:
    """F = N sum h h^T for gradients h (N, groups, n, 1) of the mean loss, and what is missing between groups."""
    h = gradients[..., 0]
    unit = samples * torch.einsum("nci,ncj->cij", h, h)
    gram = samples * (h.flatten(1) @ h.flatten(1).T)
    whole = float(gram.square().sum())
    gap = (max(whole - float(unit.square().sum()), 0.0) / whole) ** 0.5 if whole else None
    return Definition({"F": unit}, gap)


def gradient_matrix(rule: Rule, values: Mapping[str, Tensor]) -> Tensor:
    """A block's gradients as D (groups, rows, columns) of its definition's factors."""
    module = rule.module
    if not is_ours(rule):
        return laid_out(rule, values)
    if isinstance(module, Norm):
        return torch.stack([value.reshape(-1) for value in values.values()], dim=-1)[..., None]
    if isinstance(module, nn.MultiheadAttention):
        groups = 3 if "in_proj_weight" in values or "in_proj_bias" in values else 1
        parts = [value.reshape(groups, len(value) // groups, -1) for value in values.values()]
        return torch.cat(parts, dim=2)
    if isinstance(rule, TiedEmbeddingRule):
        return values["weight"][None]
    if layer_kind(module) is nn.Embedding:
        return values["weight"].T[None]
    if layer_kind(module) in (*LINEAR, *CONVOLUTIONS):
        return matrix_of(module, values)
    return laid_out(rule, values)
