"""What each layer's calls saw in one forward and backward pass, by plain hooks; nothing of our capture."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from triton_curv.blocks.kind import layer_kind

ROLES = ("q", "k", "v")


class Seen(NamedTuple):
    """One call: its input, the mean loss's gradient at its output, the output, and what to call the layer with."""

    inputs: Tensor
    grad: Tensor
    output: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Calls = dict[tuple[nn.Module, str], list[Seen]]
"""By layer and, for the input projections of an attention, role."""


@contextmanager
def watching(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[Calls]:
    """The calls of `layers`, filled by a backward pass inside.

    An attention computes meanwhile what torch's does, from projections made outside of it: torch's own function is
    given their outputs and identities as weights.
    """
    calls: Calls = {}
    attentions = [
        m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and layer_kind(m) is nn.MultiheadAttention
    ]
    handles = [layer.register_forward_hook(_hook(calls), with_kwargs=True) for layer in dict.fromkeys(layers)]
    own = {attention: attention.__dict__.get("forward") for attention in attentions}
    for attention in attentions:
        attention.__dict__["forward"] = _forward_of(attention, calls)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for attention, forward in own.items():
            if forward is None:
                del attention.__dict__["forward"]
            else:
                attention.__dict__["forward"] = forward


def _hook(calls: Calls) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        given = (*args, *kwargs.values())
        if isinstance(output, Tensor) and output.requires_grad and given and isinstance(given[0], Tensor):
            args = tuple(_copy(value) for value in args)
            kwargs = {name: _copy(value) for name, value in kwargs.items()}
            first = (*args, *kwargs.values())[0]
            kept = output.detach().clone()
            output.register_hook(
                lambda grad: calls.setdefault((module, ""), []).append(Seen(first, grad.clone(), kept, args, kwargs))
            )

    return hook


def _copy(value: Any) -> Any:
    """What a layer was given, as it was before anything worked on it in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _forward_of(attention: nn.MultiheadAttention, calls: Calls) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def keep(layer: nn.Module, role: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Samples first: (N, T, features)."""
        if output.requires_grad:
            x, y = inputs.detach().transpose(0, 1).clone(), output.detach().transpose(0, 1).clone()
            output.register_hook(
                lambda grad: calls.setdefault((layer, role), []).append(
                    Seen(x, grad.transpose(0, 1).clone(), y, (), {})
                )
            )
        return output

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched, packed = query.dim() == 3, attention.in_proj_weight
        separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        weights = packed.chunk(3) if packed is not None else separate
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        projected: list[Tensor] = []
        for role, x, weight, bias in zip(ROLES, (query, key, value), weights, biases, strict=True):
            x = x[:, None] if not batched else x.transpose(0, 1) if attention.batch_first else x
            projected.append(keep(attention, role, x, functional.linear(x, weight, bias)))
        same = torch.eye(attention.embed_dim, dtype=query.dtype, device=query.device)
        q, k, v = projected
        mixed, shares = functional.multi_head_attention_forward(
            q,
            k,
            v,
            embed_dim_to_check=attention.embed_dim,
            num_heads=attention.num_heads,
            in_proj_weight=None,
            in_proj_bias=None,
            bias_k=attention.bias_k,
            bias_v=attention.bias_v,
            add_zero_attn=attention.add_zero_attn,
            dropout_p=attention.dropout,
            out_proj_weight=same,
            out_proj_bias=None,
            training=attention.training,
            key_padding_mask=key_padding_mask if batched or key_padding_mask is None else key_padding_mask[None],
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=same,
            k_proj_weight=same,
            v_proj_weight=same,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        last = attention.out_proj
        output = keep(last, "", mixed, functional.linear(mixed, last.weight, last.bias))
        if not batched:
            return output[:, 0], None if shares is None else shares[0]
        return output.transpose(0, 1) if attention.batch_first else output, shares

    return forward
