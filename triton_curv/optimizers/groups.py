"""Which layer of a model gets a block, and which parameter group each parameter lands in."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from triton_curv.blocks import (
    DenseRule,
    EmbeddingRule,
    LayerOptions,
    NormFisher,
    Rule,
    TiedEmbeddingRule,
    TiedRule,
    WeightSharing,
    attention_rules,
    rule_for,
)
from triton_curv.blocks.kind import layer_kind
from triton_curv.errors import ConfigurationError, SparseGradientError
from triton_curv.optimizers.fallback import FALLBACKS, FallbackName

LAYER_OPTIONS = tuple(field.name for field in fields(LayerOptions))


def choose(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ConfigurationError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigurationError(f"expected {name} to be one of {list(allowed)}, got {value!r}")


def check_hyper_parameters(group: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for a number out of range in a parameter group, or a parameter that can't be trained."""
    check_parameters((f"of shape {tuple(p.shape)}", p) for p in group["params"])
    for key in ("lr", "weight_decay", "damping", "relative_damping"):
        value = float(group[key])
        if not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"expected {key} >= 0, got {value}")
    if not 0 <= float(group["momentum"]) < 1:
        raise ConfigurationError(f"expected momentum in [0, 1), got {float(group['momentum'])}")


def check_parameters(params: Iterable[tuple[str, Parameter]]) -> None:
    """Raise ConfigurationError for a parameter to train that has no numbers yet, or other than real ones."""
    for name, p in params:
        if isinstance(p, UninitializedParameter):
            raise ConfigurationError(
                f"expected initialised parameters, got '{name}' of a lazy layer: run it once first"
            )
        if p.requires_grad and not p.is_floating_point():
            raise ConfigurationError(f"expected real floating-point parameters, got {p.dtype}: '{name}'")


def warn_of_untrained(names: Mapping[Parameter, str], trained: Sequence[Parameter]) -> None:
    """Warn of parameters that were frozen when the optimizer was built, and that now have gradients."""
    known = set(trained)
    found = [name for p, name in names.items() if p not in known and p.requires_grad and p.grad is not None]
    if found:
        warnings.warn(
            f"KFAC does not train {found}, which were frozen when it was built and now have gradients: give them to "
            "add_param_group(), or build the optimizer anew for blocks of their layers",
            stacklevel=6,
        )


def group_of(name: str, overrides: Sequence[Mapping[str, Any]]) -> int:
    """Number of the first override whose patterns match a module's name; their count if none does."""
    for i, override in enumerate(overrides):
        patterns = override["modules"]
        if any(fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns)):
            return i
    return len(overrides)


def options_of(name: str, options: LayerOptions, overrides: Sequence[Mapping[str, Any]]) -> LayerOptions:
    """The options of one module: those of the first override that matches, the common ones for the rest."""
    index = group_of(name, overrides)
    own = overrides[index] if index < len(overrides) else {}
    return replace(options, **{key: own[key] for key in LAYER_OPTIONS if key in own})


def check_options(options: LayerOptions, overrides: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigurationError for an option that no layer can have."""
    for override in overrides:
        if "modules" not in override:
            raise ConfigurationError(f"expected a group with 'modules', got {sorted(override)}")
    for each in (options, *(replace(options, **{k: o[k] for k in LAYER_OPTIONS if k in o}) for o in overrides)):
        choose("norm_fisher", each.norm_fisher, get_args(NormFisher))
        choose("weight_sharing", each.weight_sharing, get_args(WeightSharing))
        if min(each.max_factor_dim, each.max_output_dim) < 1 or min(each.conv_samples, each.batch_dim) < 0:
            raise ConfigurationError(
                "expected max_factor_dim >= 1, max_output_dim >= 1, conv_samples >= 0 and batch_dim >= 0, got "
                f"{each.max_factor_dim}, {each.max_output_dim}, {each.conv_samples} and {each.batch_dim}"
            )


def rules_of(
    model: nn.Module, options: LayerOptions, overrides: Sequence[Mapping[str, Any]] = ()
) -> tuple[dict[str, Rule], dict[Parameter, str]]:
    """A rule for each layer that has one, by block name; and for every other parameter why it has none."""
    check_options(options, overrides)
    check_parameters(model.named_parameters())
    names = {module: name for name, module in model.named_modules()}
    users: dict[Parameter, list[nn.Module]] = {}
    for module in names:
        for p in module._parameters.values():
            if p is not None:
                users.setdefault(p, []).append(module)
    inside_attention = {m.out_proj for m in names if layer_kind(m) is nn.MultiheadAttention}
    rules: dict[str, Rule] = {}
    reasons: dict[Parameter, str] = {}
    covered: set[Parameter] = set()
    for module, name in names.items():
        trainable = {k: p for k, p in module.named_parameters(recurse=False) if p.requires_grad}
        own = {k: p for k, p in trainable.items() if p not in reasons and p not in covered}
        if not own:
            continue
        layer = options_of(name, options, overrides)
        shared = [p for p in own.values() if len(set(users[p])) > 1]
        found: Rule | str | dict[str, Rule]
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise SparseGradientError(
                f"'{name}' has sparse=True, but K-FAC's momentum moves every row: set sparse=False"
            )
        if any(p in covered for p in trainable.values()):
            found = "the block of its shared weight does not cover it"
        elif shared:
            found = tied_rule(users[shared[0]], shared[0], names, options, overrides)
        elif layer_kind(module) is nn.MultiheadAttention:
            found = attention_rules(module, own, layer)
        elif module in inside_attention:
            found = (
                "its weight is frozen" if "weight" not in own else DenseRule(module, own, replace(layer, batch_dim=1))
            )
        elif layer_kind(module) is NonDynamicallyQuantizableLinear:
            found = "a projection of a subclass of nn.MultiheadAttention, which bypasses this module's forward"
        else:
            found = rule_for(module, own, layer)
        if isinstance(found, str):
            reasons.update(dict.fromkeys(own.values(), found))
            continue
        new = {name + ending: rule for ending, rule in found.items()} if isinstance(found, dict) else {name: found}
        rules.update(new)
        covered.update(p for rule in new.values() for p in rule.params.values())
        rest = "the layer's block does not cover it" if new else f"no block for {layer_kind(module).__name__}"
        reasons.update({p: rest for p in own.values() if p not in covered})
    return rules, reasons


def tied_rule(
    modules: Sequence[nn.Module],
    weight: Parameter,
    names: Mapping[nn.Module, str],
    options: LayerOptions,
    overrides: Sequence[Mapping[str, Any]],
) -> Rule | str:
    """One rule, by the first one's options, for the uses of `weight` in several layers, or why there is none."""
    modules = list(dict.fromkeys(modules))
    first = f"'{names[modules[0]]}' and '{names[modules[1]]}'"
    if any(module._parameters.get("weight") is not weight for module in modules):
        return f"it is shared between {first}, not as the weight of both"
    layer = options_of(names[modules[0]], options, overrides)
    kinds = {layer_kind(module) for module in modules}
    params = {"weight": weight}
    embeddings = [module for module in modules if isinstance(module, nn.Embedding)]
    if kinds == {nn.Embedding, nn.Linear} and len(embeddings) == 1:
        found = rule_for(embeddings[0], params, layer)
        heads = [module for module in modules if module is not embeddings[0]]
        return TiedEmbeddingRule(found, heads, params, layer) if isinstance(found, EmbeddingRule) else str(found)
    if len(kinds) > 1 or isinstance(modules[0], _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return f"it is shared between {first}: layers that have no curvature in common"
    biases = {module._parameters.get("bias") for module in modules}
    (bias, *others) = biases
    if bias is not None and not others and bias.requires_grad:
        params["bias"] = bias
    found_rules = [rule_for(module, params, layer) for module in modules]
    tied = [rule for rule in found_rules if not isinstance(rule, str)]
    if len(tied) < len(modules):
        return next(rule for rule in found_rules if isinstance(rule, str))
    if len({str((rule.factor_shapes, rule.matrix_shape)) for rule in tied}) > 1:
        return f"it is shared between {first}, whose factors differ in shape"
    return TiedRule(tied)


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
        unknown = set(override) - set(defaults) - {"modules", "fallback_lr", *LAYER_OPTIONS}
        if unknown or "modules" not in override:
            raise ConfigurationError(
                f"expected a group with 'modules' and any of {sorted(defaults)}, got {sorted(override)}"
            )

    settings = [{k: v for k, v in o.items() if k not in ("modules", *LAYER_OPTIONS)} for o in overrides] + [{}]
    blocks: list[list[str]] = [[] for _ in settings]
    loose: list[list[Parameter]] = [[] for _ in settings]
    placed: set[Parameter] = set()
    blocks_of: dict[nn.Module, list[str]] = {}
    for block, rule in rules.items():
        blocks_of.setdefault(rule.module, []).append(block)
    for name, module in model.named_modules():
        index = group_of(name, overrides)
        for block in blocks_of.get(module, ()):
            blocks[index].append(block)
            placed.update(rules[block].params.values())
        for p in module.parameters(recurse=False):
            if p.requires_grad and p not in placed:
                loose[index].append(p)
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
