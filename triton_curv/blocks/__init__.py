"""Curvature blocks: one rule per layer family, and which rule a layer gets."""

from triton_curv.blocks.attention import attention_rules
from triton_curv.blocks.bank import FactorStore
from triton_curv.blocks.block import Block
from triton_curv.blocks.conv import ConvRule
from triton_curv.blocks.conv_rows import ConvRowsRule
from triton_curv.blocks.conv_transpose import ConvTransposeRule
from triton_curv.blocks.dense import DenseRule, TransposedDenseRule
from triton_curv.blocks.embedding import EmbeddingRule
from triton_curv.blocks.norm import BatchNormRule, GroupNormRule, InstanceNormRule, LayerNormRule, NormRule
from triton_curv.blocks.options import LayerOptions, NormFisher, WeightSharing
from triton_curv.blocks.registry import register_block, rule_for
from triton_curv.blocks.rule import FactorShape, MaskedSource, Rule, Source, Uses
from triton_curv.blocks.tied import TiedEmbeddingRule, TiedRule

__all__ = [
    # what a block is made of
    "Block",
    "FactorShape",
    "FactorStore",
    "LayerOptions",
    "MaskedSource",
    "NormFisher",
    "Rule",
    "Source",
    "Uses",
    "WeightSharing",
    # rules
    "BatchNormRule",
    "ConvRowsRule",
    "ConvRule",
    "ConvTransposeRule",
    "DenseRule",
    "EmbeddingRule",
    "GroupNormRule",
    "InstanceNormRule",
    "LayerNormRule",
    "NormRule",
    "TiedEmbeddingRule",
    "TiedRule",
    "TransposedDenseRule",
    "attention_rules",
    "register_block",
    "rule_for",
]
