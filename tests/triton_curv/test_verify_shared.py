"""`triton-curv verify` on attention, tied weights and registered blocks: compared, and red on planted bugs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_curv as tc
from triton_curv.blocks import ConvRowsRule, DenseRule, EmbeddingRule, FactorShape, LayerOptions, Uses, registry, tied
from triton_curv.blocks.attention import BiasPart, ProjectionPart, ProjectionRule
from triton_curv.verification import Verdict, shrink, verify


class Mixed(nn.Module):
    """Self- and cross-attention, a norm and a pair of layers used twice, a head tied to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16, padding_idx=0)
        self.own = nn.MultiheadAttention(16, 4, dropout=0.1, add_bias_kv=True, batch_first=True)
        self.across = nn.MultiheadAttention(16, 4, kdim=6, vdim=10, add_zero_attn=True)
        self.keys, self.values, self.norm = nn.Linear(16, 6), nn.Linear(16, 10), nn.LayerNorm(16)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = self.norm(x + self.own(x, x, x, attn_mask=future, need_weights=False)[0])
        memory, padding = torch.cat([x, x[:, :3]], dim=1).transpose(0, 1), torch.zeros(len(x), x.shape[1] + 3)
        padding[0, -2:] = -torch.inf
        mixed = self.across(x.transpose(0, 1), self.keys(memory), self.values(memory), key_padding_mask=padding.bool())
        x = self.norm(x + mixed[0].transpose(0, 1))
        y: Tensor = self.head(self.two(torch.tanh(self.one(x))))
        return y


def verdict_of(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> Verdict:
    torch.manual_seed(0)
    return verify(shrink(model, (5, *shape), (dtype,)), "net")


def wrong_in(verdict: Verdict) -> list[str]:
    return [row.block for row in verdict.blocks if not row.ok]


def test_attention_and_tied_weights_are_compared_and_planted_bugs_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = verdict_of(Mixed(), 7, dtype=torch.int64)
    assert [row.block for row in mixed.blocks if row.factors is None or row.solve is None] == []
    assert len(mixed.blocks) == 12
    assert mixed.ok

    def broken(owner: Any, name: str, change: Any) -> list[str]:
        right = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *given: change(right, *given))
            return wrong_in(verdict_of(Mixed(), 7, dtype=torch.int64))

    def swapped(right: Any, part: Any, *given: Any) -> Any:
        return right(replace(part, index=(0, 2, 1)[part.index]), *given)

    def keys_halved(right: Any, rule: Any, sums: Any, inputs: Tensor, *rest: Any) -> Any:
        return right(rule, sums, inputs / 2 if rule.weight_name[0] == "k" else inputs, *rest)

    def first_only(right: Any, rules: Any) -> Any:
        rule = right(rules)
        rule.members = rule.members[:1]
        return rule

    def with_padding(right: Any, rule: Any, *given: Any) -> Any:
        tokens, weights, signal = right(rule, *given)
        return tokens, torch.ones_like(weights), given[1].reshape(signal.shape)

    assert broken(ProjectionPart, "accumulate_", swapped) == ["own"]
    assert broken(ProjectionRule, "accumulate_masked_", keys_halved) == ["across.k_proj"]
    assert broken(BiasPart, "accumulate_", swapped) == ["across.in_proj_bias"]
    assert broken(EmbeddingRule, "token_rows", with_padding) == ["tokens"]
    monkeypatch.setattr("triton_curv.optimizers.groups.TiedRule", lambda rules: first_only(tied.TiedRule, rules))
    assert wrong_in(verdict_of(Mixed(), 7, dtype=torch.int64)) == ["one"]


class Scaled(nn.Linear):
    """y = (W 2x + b) / 2."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input) / 2


class ScaledRule(DenseRule):
    def accumulate_masked_(self, sums: Any, inputs: Tensor, grad_output: Tensor, mask: Tensor | None) -> Uses:
        return super().accumulate_masked_(sums, 2 * inputs, grad_output / 2, mask)


class Turned(nn.Conv1d):
    """A convolution of the sequence from its end."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flip(-1)).flip(-1)


class TurnedRule(ConvRowsRule):
    def accumulate_(self, sums: Any, inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        return super().accumulate_(sums, inputs.flip(-1), grad_output.flip(-1), training)


class Gain(nn.Module):
    """y = w x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class GainRule:
    """The whole Fisher of a gain."""

    def __init__(self, module: Gain, params: Mapping[str, nn.Parameter], options: LayerOptions) -> None:
        self.module, self.params, self.approximation = module, params, "exact"
        self.factor_shapes = {"F": FactorShape(1, len(module.gain))}
        self.matrix_shape = (1, len(module.gain), 1)

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        h = inputs * grad_output
        sums["F"][0].addmm_(h.T, h)
        return Uses(len(h), len(h))

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"gain": matrix[0, :, 0]}

    def present(self, name: str, factor: Tensor) -> Tensor:
        return factor[0]


class Noisy(nn.Linear):
    """Has no definition: it is another function each time."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + torch.rand(()))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    for kind, rule in ((Scaled, ScaledRule), (Turned, TurnedRule), (Gain, GainRule), (Noisy, DenseRule)):
        tc.register_block(kind, rule)


def own_layers() -> nn.Module:
    return nn.Sequential(
        Turned(2, 4, 3), nn.Tanh(), Scaled(6, 5), nn.Flatten(), Gain(20), nn.Linear(20, 8), Scaled(8, 3, bias=False)
    )


def test_registered_blocks_are_compared_and_planted_bugs_found(registered: None) -> None:
    verdict = verdict_of(own_layers(), 2, 8)
    assert [(row.block, row.factors is not None) for row in verdict.blocks] == [(n, True) for n in "02456"]
    assert verdict.ok
    tc.register_block(Scaled, DenseRule)
    assert wrong_in(verdict_of(own_layers(), 2, 8)) == ["2"]  # "6", without a bias: a factor 4 between A and G
    tc.register_block(Turned, ConvRowsRule)
    assert wrong_in(verdict_of(own_layers(), 2, 8)) == ["0", "2"]
    halved = type(
        "HalvedRule", (GainRule,), {"accumulate_": lambda *given: GainRule.accumulate_(*given)._replace(samples=1)}
    )
    tc.register_block(Gain, halved)
    assert wrong_in(verdict_of(own_layers(), 2, 8)) == ["0", "2", "4"]


def test_a_layer_without_a_definition_says_why(registered: None) -> None:
    (row,) = verdict_of(nn.Sequential(Noisy(4, 3)), 4).blocks
    assert row.factors is None
    assert "called again its output differs" in row.note
