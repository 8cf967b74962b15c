"""Putting taps on a model and taking them off again."""

from collections.abc import Iterable
from typing import Protocol

from torch.nn import DataParallel, Module, MultiheadAttention

from triton_curv.blocks import Block, TiedEmbeddingRule, TiedRule
from triton_curv.blocks.kind import layer_kind
from triton_curv.capture.attention import AttentionTaps, attach_attention
from triton_curv.capture.tap import CaptureSwitch, LayerHook, ModelHook, Site
from triton_curv.errors import ConfigurationError


class Handle(Protocol):
    """Undoes one attachment."""

    def remove(self) -> None:
        """Take it off the model."""


def attach_taps(model: Module, blocks: Iterable[Block], switch: CaptureSwitch) -> list[Handle]:
    """Tap every block's layers while `switch.enabled`: by forward hooks, attention by another forward.

    Raises ConfigurationError for a model whose layers run as replicas, on other devices than the factors.
    """
    replicated = [m for m in model.modules() if isinstance(m, DataParallel) and len(m.device_ids) > 1]
    if replicated:
        raise ConfigurationError(
            f"expected DistributedDataParallel or no wrapper, got DataParallel on devices {replicated[0].device_ids}"
        )
    hooks: list[Handle] = [model.register_forward_pre_hook(ModelHook(switch))]
    attentions = {
        m.out_proj: m
        for m in model.modules()
        if isinstance(m, MultiheadAttention) and layer_kind(m) is MultiheadAttention
    }
    taps: dict[MultiheadAttention, AttentionTaps] = {}
    for block in blocks:
        rule = block.rule
        if isinstance(rule.module, MultiheadAttention):
            own = taps.setdefault(rule.module, AttentionTaps(switch))
            for role, source in getattr(rule, "sources", {}).items():
                own.add(role, Site(block, source, counted=role == next(iter(getattr(rule, "sources", {})))))
        elif rule.module in attentions:
            taps.setdefault(attentions[rule.module], AttentionTaps(switch)).add("out", Site(block, rule))
        else:
            members = rule.members if isinstance(rule, TiedRule | TiedEmbeddingRule) else [(rule.module, rule)]
            for module, source in members:
                hook = LayerHook(Site(block, source), switch)
                hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    return [*hooks, *(attach_attention(module, own) for module, own in taps.items())]
