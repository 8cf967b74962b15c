"""Which layer of a model gets a block, and which parameter group each parameter lands in."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from triton_curv.blocks import NormFisher, Rule, rule_for
from triton_curv.errors import ConfigurationError
from triton_curv.optimizers.fallback import FALLBACKS, FallbackName


def choose(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ConfigurationError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigurationError(f"expected {name} to be one of {list(allowed)}, got {value!r}")


def check_hyper_parameters(group: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for a number out of range in a parameter group."""
    for key in ("lr", "weight_decay", "damping", "relative_damping"):
        value = float(group[key])
        if not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"expected {key} >= 0, got {value}")
    if not 0 <= float(group["momentum"]) < 1:
        raise ConfigurationError(f"expected momentum in [0, 1), got {float(group['momentum'])}")


def rules_of(model: nn.Module, norm_fisher: NormFisher) -> tuple[dict[str, Rule], dict[Parameter, str]]:
    """A rule for each layer that has one, by module name; and for every other parameter why it has none."""
    uses: dict[Parameter, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                uses[p] = uses.get(p, 0) + 1
    rules: dict[str, Rule] = {}
    reasons: dict[Parameter, str] = {}
    for name, module in model.named_modules():
        own = {k: p for k, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            continue
        shared = [k for k, p in own.items() if uses[p] > 1]
        inside_attention = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        rule = None if shared or inside_attention else rule_for(module, own, norm_fisher)
        if rule is not None:
            rules[name] = rule
            continue
        if shared:
            reason = f"'{shared[0]}' is shared between modules"
        elif inside_attention:
            reason = "nn.MultiheadAttention bypasses this module's forward"
        elif "weight" not in own and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            reason = "its weight is frozen"
        else:
            reason = f"no block for {type(module).__name__}"
        reasons.update(dict.fromkeys(own.values(), reason))
    return rules, reasons


def param_groups_of(
    model: nn.Module,
    rules: Mapping[str, Rule],
    defaults: Mapping[str, Any],
    overrides: Sequence[Mapping[str, Any]],
    fallback_lr: float | Tensor,
    fallback: FallbackName,
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Parameter groups (those with blocks first), and the names of the blocks in each of the first ones."""
    for override in overrides:
        unknown = set(override) - set(defaults) - {"modules", "fallback_lr"}
        if unknown or "modules" not in override:
            raise ConfigurationError(
                f"expected a group with 'modules' and any of {sorted(defaults)}, got {sorted(override)}"
            )

    def group_of(name: str) -> int:
        for i, override in enumerate(overrides):
            patterns = override["modules"]
            if any(fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns)):
                return i
        return len(overrides)

    settings = [{k: v for k, v in o.items() if k != "modules"} for o in overrides] + [{}]
    blocks: list[list[str]] = [[] for _ in settings]
    loose: list[list[Parameter]] = [[] for _ in settings]
    placed: set[Parameter] = set()
    for name, module in model.named_modules():
        if name in rules:
            blocks[group_of(name)].append(name)
            placed.update(rules[name].params.values())
            continue
        for p in module.parameters(recurse=False):
            if p.requires_grad and p not in placed:
                loose[group_of(name)].append(p)
                placed.add(p)
    empty = [o["modules"] for o, b, p in zip(overrides, blocks, loose, strict=False) if not b and not p]
    if empty:
        raise ConfigurationError(f"expected every group pattern to match a module, got no match for {empty}")

    groups: list[dict[str, Any]] = []
    for setting, names in zip(settings, blocks, strict=True):
        if names:
            params = [p for name in names for p in rules[name].params.values()]
            own = {k: v for k, v in setting.items() if k != "fallback_lr"}
            groups.append({"params": params, "kind": "kfac", "step": 0, **own})
    for setting, params in zip(settings, loose, strict=True):
        if params:
            rest = {"lr": setting.get("fallback_lr", setting.get("lr", fallback_lr))}
            own = {k: v for k, v in setting.items() if k not in ("lr", "fallback_lr")}
            base = {"params": params, "kind": "fallback", "step": 0}
            groups.append({**base, **FALLBACKS[fallback].defaults, **own, **rest})
    return groups, [names for names in blocks if names]
