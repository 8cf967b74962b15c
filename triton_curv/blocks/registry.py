"""Which rule a layer gets: built-in layers, and those a user registers."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn import Module, Parameter

from triton_curv.blocks.conv_rows import conv_rule
from triton_curv.blocks.conv_transpose import conv_transpose_rule
from triton_curv.blocks.dense import DenseRule, TransposedDenseRule
from triton_curv.blocks.embedding import EmbeddingRule
from triton_curv.blocks.kind import layer_kind
from triton_curv.blocks.norm import BatchNormRule, GroupNormRule, InstanceNormRule, LayerNormRule
from triton_curv.blocks.options import LayerOptions
from triton_curv.blocks.rows import RowsSource
from triton_curv.blocks.rule import Rule
from triton_curv.errors import ConfigurationError

RuleFactory = Callable[[Any, Mapping[str, Parameter], LayerOptions], Rule | str]


def embedding_rule(module: nn.Embedding, params: Mapping[str, Parameter], options: LayerOptions) -> Rule | str:
    """The rule of `torch.nn.Embedding`, or why there is none."""
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq makes its gradient that of another loss"
    return EmbeddingRule(module, params, options)


BUILT_IN: dict[type[Module] | str, RuleFactory] = {
    nn.Linear: DenseRule,
    nn.Conv1d: conv_rule,
    nn.Conv2d: conv_rule,
    nn.Conv3d: conv_rule,
    nn.ConvTranspose1d: conv_transpose_rule,
    nn.ConvTranspose2d: conv_transpose_rule,
    nn.ConvTranspose3d: conv_transpose_rule,
    nn.Embedding: embedding_rule,
    nn.BatchNorm1d: BatchNormRule,
    nn.BatchNorm2d: BatchNormRule,
    nn.BatchNorm3d: BatchNormRule,
    nn.InstanceNorm1d: InstanceNormRule,
    nn.InstanceNorm2d: InstanceNormRule,
    nn.InstanceNorm3d: InstanceNormRule,
    nn.GroupNorm: GroupNormRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: LayerNormRule,
    "timm.layers.norm.LayerNorm": LayerNormRule,
    "transformers.pytorch_utils.Conv1D": TransposedDenseRule,
}
NEEDS_WEIGHT = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_registered: dict[type[Module] | str, RuleFactory] = {}


def register_block(kind: type[Module] | str, factory: RuleFactory) -> None:
    """Give layers of exactly the class `kind` the curvature block that `factory(module, params, options)` returns.

    `kind` is a class or its full name, for classes that need not be importable here. `params` are the layer's own
    trainable parameters by name, `options` the `LayerOptions` that hold for it; the result is a `Rule`, or a string
    that says why this layer has none. It must have "weight" in `params` where it needs one. A registration replaces an
    earlier one, also of a built-in layer; it counts for optimizers built afterwards.

    A layer that computes what another one does takes that one's rule, `register_block(MyLinear, tc.blocks.DenseRule)`.
    One that changes inputs or outputs on the way changes what the rule sees; weight sharing, masks, splitting of large
    factors and the rest stay as they are:

    >>> import torch, triton_curv as tc
    >>> class ScaledLinear(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(2 * x) / 2
    >>> class ScaledRule(tc.blocks.DenseRule):
    ...     def accumulate_masked_(self, sums, inputs, grad_output, mask):
    ...         return super().accumulate_masked_(sums, 2 * inputs, grad_output / 2, mask)
    >>> tc.register_block(ScaledLinear, ScaledRule)
    >>> model = torch.nn.Sequential(ScaledLinear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    >>> optimizer = tc.KFAC(model, lr=0.01)
    >>> list(optimizer.blocks)
    ['0', '2']
    >>> model(torch.ones(8, 4)).square().mean().backward()
    >>> optimizer.blocks["0"].factors()["A"].diagonal().round().tolist()
    [4.0, 4.0, 4.0, 4.0, 1.0]

    Raises:
        ConfigurationError: `kind` is neither a module class nor a dotted name.

    """
    is_class = isinstance(kind, type) and issubclass(kind, Module)
    if not is_class and not (isinstance(kind, str) and "." in kind):
        raise ConfigurationError(f"expected a subclass of nn.Module or its full name 'package.Class', got {kind!r}")
    _registered[kind] = factory


def rule_for(module: Module, params: Mapping[str, Parameter], options: LayerOptions) -> Rule | str:
    """The curvature of a layer whose trainable parameters are `params`, or why it has none.

    Subclasses are taken only where they keep the layer's forward formula, which we can't know: exact types only.
    """
    kind = layer_kind(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    for table in (_registered, BUILT_IN):
        factory = table.get(kind) or table.get(name)
        if factory is not None:
            on_rows = isinstance(factory, type) and issubclass(factory, RowsSource)
            if "weight" not in params and (kind in NEEDS_WEIGHT or on_rows):
                return "its weight is frozen"
            return factory(module, params, options)
    return f"no block for {kind.__name__ if kind.__module__.startswith('torch.') else name}"
