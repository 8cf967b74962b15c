"""Taps inside `torch.nn.MultiheadAttention`, which calls its projections as functions: hooks would never run.

While taps are on, the module's forward is `attend` below, which computes what torch's does, step by step, with taps on
the projections; otherwise it is torch's own, fast path included. A forward set on the instance is seen by the guards
of `torch.compile`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import MultiheadAttention, functional

from triton_curv.capture.tap import CaptureSwitch, Site, tap
from triton_curv_kernels import UnsupportedInputError


class AttentionTaps:
    """The taps of one optimizer in one attention: lists of sites for "q", "k", "v" and "out"."""

    def __init__(self, switch: CaptureSwitch) -> None:
        self.switch = switch
        self.sites: dict[str, list[Site]] = {}

    def add(self, role: str, site: Site) -> None:
        """Tap a projection."""
        self.sites.setdefault(role, []).append(site)

    @property
    def on(self) -> bool:
        """Whether one of them is to take statistics; in a graph all do."""
        sites = (site for sites in self.sites.values() for site in sites)
        return self.switch.enabled and (torch.compiler.is_compiling() or any(site.block.due for site in sites))

    def tapped(self, role: str, output: Tensor, inputs: Tensor, training: bool) -> Tensor:
        """The output of a projection with its taps."""
        if self.switch.enabled and output.requires_grad:
            for site in self.sites.get(role, ()):
                output = tap(output, inputs, site, self.switch, training)
        return output


def plain_forward(module: MultiheadAttention) -> Callable[..., Any]:
    """What a tapped forward becomes in a copied or unpickled model: torch's own."""
    forward: Callable[..., Any] = type(module).forward.__get__(module)
    return forward


class TappedForward:
    """The forward of an attention with taps of one or more optimizers."""

    def __init__(self, module: MultiheadAttention) -> None:
        self.module = module
        self.taps: list[AttentionTaps] = []

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`attend` while taps are on, else torch's forward."""
        on = [taps for taps in self.taps if taps.on]
        if not on or not torch.is_grad_enabled():
            result: tuple[Tensor, Tensor | None] = type(self.module).forward(self.module, *args, **kwargs)
            return result
        return attend(self.module, on, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[MultiheadAttention]]:
        return plain_forward, (self.module,)


class AttentionHandle:
    """Takes the taps of one optimizer off an attention."""

    def __init__(self, forward: TappedForward, taps: AttentionTaps) -> None:
        self.forward = forward
        self.taps = taps

    def remove(self) -> None:
        """Take them off; the last one restores the class's forward."""
        if self.taps in self.forward.taps:
            self.forward.taps.remove(self.taps)
            if not self.forward.taps:
                self.forward.module.__dict__.pop("forward", None)


def attach_attention(module: MultiheadAttention, taps: AttentionTaps) -> AttentionHandle:
    """Put taps on an attention; the handle takes them off."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, TappedForward):
        forward = TappedForward(module)
        module.__dict__["forward"] = forward
    forward.taps.append(taps)
    return AttentionHandle(forward, taps)


def attend(
    module: MultiheadAttention,
    taps: list[AttentionTaps],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.MultiheadAttention.forward` with taps on its four projections; same arguments and results."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise UnsupportedInputError("expected padded tensors in attention whose statistics are taken, got nested ones")
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched = query.dim() == 3
    time_first = [_time_first(x, batched, module.batch_first) for x in (query, key, value)]
    targets, samples, _ = time_first[0].shape
    heads, width = module.num_heads, module.head_dim
    q, k, v = _projections(module, taps, time_first)
    bias = _score_bias(
        module,
        q,
        k,
        attn_mask,
        key_padding_mask if batched or key_padding_mask is None else key_padding_mask[None],
        is_causal and not need_weights,
    )
    is_causal = is_causal and key_padding_mask is None and not need_weights
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(1, samples, -1)])
        v = torch.cat([v, module.bias_v.expand(1, samples, -1)])
    q, k, v = (x.reshape(len(x), samples, heads, width).permute(1, 2, 0, 3) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    dropout = module.dropout if module.training else 0.0
    weights: Tensor | None = None
    if need_weights:
        scores = (q * math.sqrt(1.0 / width)) @ k.mT
        weights = functional.softmax(scores if bias is None else scores + bias, dim=-1)
        if dropout > 0:
            weights = functional.dropout(weights, dropout)
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights[0]
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal)
    mixed = mixed.permute(2, 0, 1, 3).reshape(targets, samples, heads * width)
    output = functional.linear(mixed, module.out_proj.weight, module.out_proj.bias)
    for each in taps:
        output = each.tapped("out", output, mixed, module.training)
    if not batched:
        return output[:, 0], weights
    return output.transpose(0, 1) if module.batch_first else output, weights


def _time_first(x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """(time, samples, features)."""
    if not batched:
        return x[:, None]
    return x.transpose(0, 1) if batch_first else x


def _projections(module: MultiheadAttention, taps: list[AttentionTaps], inputs: list[Tensor]) -> list[Tensor]:
    """Queries, keys and values, tapped."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    outputs = []
    for role, x, weight, bias in zip(("q", "k", "v"), inputs, weights, biases, strict=True):
        output = functional.linear(x, weight, bias)
        for each in taps:
            output = each.tapped(role, output, x, module.training)
        outputs.append(output)
    return outputs


def _score_bias(
    module: MultiheadAttention,
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """What is added to the scores (samples, heads, targets, sources): both masks, with room for extra keys."""
    extra = (module.bias_k is not None) + module.add_zero_attn
    targets, sources, samples = len(q), len(k), q.shape[1]
    total: Tensor | None = None
    if attn_mask is not None and not (is_causal and key_padding_mask is None):
        mask = _additive(attn_mask, q.dtype)
        mask = mask.view(samples, -1, targets, sources) if mask.dim() == 3 else mask
        total = functional.pad(mask, (0, extra))
    if key_padding_mask is not None:
        padding = functional.pad(_additive(key_padding_mask, q.dtype), (0, extra)).view(samples, 1, 1, sources + extra)
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores: -inf where a boolean one is True."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
