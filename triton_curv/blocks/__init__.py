"""Curvature blocks: one rule per layer family, and which rule a layer gets."""

from collections.abc import Mapping

from torch import nn
from torch.nn import Module, Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from triton_curv.blocks.bank import FactorStore
from triton_curv.blocks.block import Block
from triton_curv.blocks.conv import ConvRule
from triton_curv.blocks.dense import DenseRule
from triton_curv.blocks.norm import BatchNormRule, NormFisher
from triton_curv.blocks.rule import FactorShape, Rule, Uses

__all__ = [
    "BatchNormRule",
    "Block",
    "ConvRule",
    "DenseRule",
    "FactorShape",
    "FactorStore",
    "NormFisher",
    "Rule",
    "Uses",
    "rule_for",
]


def rule_for(module: Module, params: Mapping[str, Parameter], norm_fisher: NormFisher) -> Rule | None:
    """The curvature of a layer whose trainable parameters are `params`, or None if its family has none.

    Subclasses are taken only where they keep the layer's forward formula, which we can't know: exact types only.
    """
    kind = type(module)
    if isinstance(module, nn.Linear) and kind is nn.Linear and "weight" in params:
        return DenseRule(module, params)
    if isinstance(module, _ConvNd) and kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and "weight" in params:
        return ConvRule(module, params)
    if isinstance(module, _BatchNorm) and kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and params:
        return BatchNormRule(module, params, norm_fisher)
    return None
