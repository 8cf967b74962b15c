"""nn.MultiheadAttention: the tapped forward is torch's, and its blocks are those of four linear layers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.capture import captured, kfac
from triton_curv import KFAC

SAMPLES, TARGETS, SOURCES, WIDTH = 3, 4, 5, 6

# options of the module, of the call, whether keys and values are inputs of their own
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "self": ({}, {}, False),
    "self-batch-first": ({"batch_first": True}, {}, False),
    "no-weights": ({"batch_first": True}, {"need_weights": False}, False),
    "per-head-weights": ({"batch_first": True}, {"average_attn_weights": False}, False),
    "no-bias": ({"bias": False}, {}, False),
    "dropout": ({"dropout": 0.4, "batch_first": True}, {}, False),
    "dropout-sdpa": ({"dropout": 0.4, "batch_first": True}, {"need_weights": False}, False),
    "padding": ({"batch_first": True}, {"padding": True}, False),
    "padding-no-weights": ({}, {"padding": True, "need_weights": False}, False),
    "causal": ({"batch_first": True}, {"causal": True, "need_weights": False}, False),
    "causal-hint": ({"batch_first": True}, {"causal": True, "is_causal": True, "need_weights": False}, False),
    "causal-hint-weights": ({}, {"causal": True, "is_causal": True}, False),
    "causal-padding": ({}, {"causal": True, "is_causal": True, "padding": True, "need_weights": False}, False),
    "float-mask": ({"batch_first": True}, {"float_mask": True}, False),
    "mask-per-head": ({"batch_first": True}, {"head_mask": True, "need_weights": False}, False),
    "mask-per-head-padding": ({"batch_first": True}, {"head_mask": True, "padding": True}, False),
    "cross": ({}, {}, True),
    "cross-batch-first": ({"batch_first": True}, {"padding": True}, True),
    "kdim-vdim": ({"batch_first": True, "kdim": 4, "vdim": 5}, {}, True),
    "kdim-no-bias": ({"kdim": 4, "vdim": 5, "bias": False}, {"padding": True}, True),
    "bias-kv": ({"add_bias_kv": True, "batch_first": True}, {"padding": True}, False),
    "zero-attention": ({"add_zero_attn": True}, {"float_mask": True, "need_weights": False}, False),
    "bias-kv-and-zero": ({"add_bias_kv": True, "add_zero_attn": True}, {"causal": True}, False),
}


def setting(
    case: tuple[dict[str, Any], dict[str, Any], bool],
) -> tuple[nn.MultiheadAttention, list[Tensor], dict[str, Any]]:
    """The module in float64, its query, key and value, and the other arguments of the call."""
    options, call, cross = case
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, 2, **options).double()
    for p in module.parameters():
        nn.init.normal_(p, 0.0, 0.4)

    def sequence(time: int, width: int) -> Tensor:
        x = torch.randn(SAMPLES, time, width, dtype=torch.float64)
        return x if module.batch_first else x.transpose(0, 1).contiguous()

    query = sequence(TARGETS, WIDTH)
    inputs = [query, sequence(SOURCES, module.kdim), sequence(SOURCES, module.vdim)] if cross else [query] * 3
    if cross and module.kdim == module.vdim:
        inputs[2] = inputs[1]
    sources = SOURCES if cross else TARGETS
    arguments = {k: v for k, v in call.items() if k in ("need_weights", "average_attn_weights", "is_causal")}
    if call.get("padding"):
        arguments["key_padding_mask"] = torch.arange(sources) >= torch.tensor([sources, 2, 3])[:, None]
    if call.get("causal"):
        arguments["attn_mask"] = torch.ones(TARGETS, sources).triu(1).bool()
    if call.get("float_mask"):
        arguments["attn_mask"] = torch.randn(TARGETS, sources, dtype=torch.float64)
    if call.get("head_mask"):
        mask = torch.rand(SAMPLES * 2, TARGETS, sources) > 0.7
        arguments["attn_mask"] = mask & ~torch.eye(TARGETS, sources).bool()
        if "key_padding_mask" in arguments:
            arguments["attn_mask"] = mask & (torch.arange(sources) > 0)
    return module, inputs, arguments


def run(module: nn.Module, inputs: list[Tensor], arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(1)
    result: tuple[Tensor, Tensor | None] = module(*inputs, **arguments)
    return result


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_tapped_forward_is_torchs(case: tuple[dict[str, Any], dict[str, Any], bool]) -> None:
    module, inputs, arguments = setting(case)
    results = []
    for tapped in (False, True):
        if tapped:
            kfac(module)
        leaves = [x.clone().requires_grad_() for x in inputs]
        if inputs[0] is inputs[1]:
            leaves = leaves[:1] * 3
        output, weights = run(module, leaves, arguments)
        module.zero_grad()
        torch.autograd.backward((output**3).sum())
        grads = [p.grad for p in module.parameters()] + [x.grad for x in leaves]
        results.append([output, weights, *grads])
    for plain, tapped in zip(*results, strict=True):
        assert (plain is None) == (tapped is None)
        if plain is not None and tapped is not None:
            torch.testing.assert_close(tapped, plain, rtol=1e-10, atol=1e-12)


class FourLinears(nn.Module):
    """The same attention out of four linear layers, without dropout and masks; inputs (samples, time, features)."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        bias = module.in_proj_bias is not None
        widths = (WIDTH, module.kdim, module.vdim)
        self.q, self.k, self.v = (nn.Linear(width, WIDTH, bias=bias).double() for width in widths)
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias).double()
        self.out.load_state_dict(module.out_proj.state_dict())
        weights = (
            module.in_proj_weight.chunk(3)
            if module.in_proj_weight is not None
            else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        )
        for i, layer in enumerate((self.q, self.k, self.v)):
            layer.weight.data.copy_(weights[i])
            if bias:
                layer.bias.data.copy_(module.in_proj_bias.chunk(3)[i])

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer, x in zip((self.q, self.k, self.v), (query, key, value), strict=True)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, bias)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def twin_factors(
    module: nn.MultiheadAttention, inputs: list[Tensor], arguments: dict[str, Any], sharing: str
) -> tuple[KFAC, KFAC]:
    """KFAC on the attention and on its twin, after one backward pass of the same loss."""
    twin = FourLinears(module)
    padding = arguments.get("key_padding_mask")
    bias = None if padding is None else torch.zeros_like(padding, dtype=torch.float64).masked_fill(padding, -torch.inf)

    def loss(output: Tensor) -> Tensor:
        return (output**3).flatten(1).sum(1).mean()

    def first(x: Tensor) -> Tensor:
        return x if module.batch_first else x.transpose(0, 1)

    ours = captured(module, lambda m: loss(first(m(*inputs, **arguments)[0])), damping=0.1, weight_sharing=sharing)
    # without a batch dimension in dimension 0, the twin sees its inputs flipped
    reference = captured(
        twin,
        lambda m: loss(m(*map(first, inputs), None if bias is None else bias[:, None, None])),
        damping=0.1,
        weight_sharing=sharing,
    )
    return ours, reference


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "name",
    ["self", "self-batch-first", "no-bias", "padding", "cross", "cross-batch-first", "kdim-vdim", "kdim-no-bias"],
)
def test_blocks_are_those_of_four_linear_layers(name: str, sharing: str) -> None:
    module, inputs, arguments = setting(CASES[name])
    ours, reference = twin_factors(module, inputs, arguments, sharing)
    for optimizer in (ours, reference):
        optimizer.refresh()
    roles = ("q", "k", "v")
    expected = {role: reference.blocks[role].factors() for role in roles}
    close: Callable[..., None] = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)  # noqa: E731
    if module.in_proj_weight is not None:
        factors = ours.blocks[""].factors()
        for i, role in enumerate(roles):
            close(factors["A"][i], expected[role]["A"])
            close(factors["G"][i], expected[role]["G"])
        gradient = {n: torch.randn_like(p) for n, p in module.named_parameters() if n.startswith("in_proj")}
        solution = ours.blocks[""].precondition(gradient)
        for i, role in enumerate(roles):
            parts = {n.removeprefix("in_proj_"): g.chunk(3)[i] for n, g in gradient.items()}
            for n, value in reference.blocks[role].precondition(parts).items():
                close(solution[f"in_proj_{n}"].chunk(3)[i], value)
    else:
        for i, role in enumerate(roles):
            factors = ours.blocks[f".{role}_proj"].factors()
            width = factors["A"].shape[0]
            close(factors["A"], expected[role]["A"][:width, :width])
            close(factors["G"], expected[role]["G"])
            if module.in_proj_bias is not None:
                signal = ours.blocks[".in_proj_bias"].factors()["F"][i]
                assert signal.shape == (WIDTH, WIDTH)
                if sharing == "reduce":  # gradients summed over positions: the bias's exact Fisher
                    close(signal, expected[role]["G"])
    out = ours.blocks["out_proj"].factors()
    for key, value in reference.blocks["out"].factors().items():
        close(out[key], value)
    rows = ours.explain().rows
    assert {row.trainer for row in rows} == {"kfac"}


def test_extra_keys_and_values_are_trained_by_the_fallback() -> None:
    module, inputs, arguments = setting(CASES["bias-kv"])
    optimizer = captured(module, lambda m: (m(*inputs, **arguments)[0] ** 2).mean())
    rows = {row.parameter: row for row in optimizer.explain().rows}
    assert rows["bias_k"].trainer == rows["bias_v"].trainer == "adamw"
    assert "does not cover" in rows["bias_k"].note
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_an_unbatched_sequence_is_one_sample() -> None:
    module, _, _ = setting(CASES["self-batch-first"])
    x = torch.randn(TARGETS, WIDTH, dtype=torch.float64)
    factors = []
    for inputs in (x, x[None]):
        optimizer = kfac(module)
        (module(inputs, inputs, inputs)[0] ** 3).sum().backward()
        factors.append({**optimizer.blocks[""].factors(), **optimizer.blocks["out_proj"].factors()})
        optimizer.detach()
        module.zero_grad()
    for key, value in factors[0].items():
        torch.testing.assert_close(factors[1][key], value)


def test_frozen_projections() -> None:
    module, inputs, arguments = setting(CASES["self"])
    module.in_proj_weight.requires_grad_(False)
    rows = {row.parameter: row for row in kfac(module).explain().rows}
    assert rows["in_proj_bias"].trainer == "adamw"
    assert rows["out_proj.weight"].trainer == "kfac"
    module, inputs, arguments = setting(CASES["self"])
    module.in_proj_bias.requires_grad_(False)
    optimizer = captured(module, lambda m: (m(*inputs, **arguments)[0] ** 2).mean())
    assert optimizer.blocks[""].factors()["A"].shape == (3, WIDTH, WIDTH)
    optimizer.step()


def test_a_subclass_says_why_it_has_no_block() -> None:
    class Own(nn.MultiheadAttention):
        pass

    rows = kfac(nn.Sequential(Own(4, 2), nn.Linear(4, 4))).explain().rows
    notes = {row.parameter: row.note for row in rows}
    assert "Own" in notes["0.in_proj_weight"]
    assert "bypasses" in notes["0.out_proj.weight"]


def test_taps_off_is_torchs_own_forward() -> None:
    module, inputs, _ = setting(CASES["self-batch-first"])
    optimizer = kfac(module)
    optimizer.capture(False)
    module(*inputs)[0].sum().backward()
    assert not optimizer._store.counts.any()
    optimizer.capture(True)
    with torch.no_grad():
        module(*inputs)
    assert not optimizer._store.counts.any()
    other = kfac(module)
    module(*inputs)[0].sum().backward()
    assert optimizer._store.counts.any()
    assert other._store.counts.any()
    optimizer.detach()
    assert "forward" in module.__dict__
    other.detach()
    assert "forward" not in module.__dict__


def test_copies_are_not_tapped() -> None:
    module, inputs, _ = setting(CASES["self-batch-first"])
    optimizer = kfac(module)
    file = io.BytesIO()
    torch.save(module, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for twin in (copy.deepcopy(module), loaded):
        output = twin(*inputs)[0]
        torch.testing.assert_close(output, module(*inputs)[0])
        output.sum().backward()
        assert twin.in_proj_weight.grad is not None
        assert not optimizer._store.counts.any()
        assert copy.deepcopy(twin)(*inputs)[0].shape == output.shape


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_encoder_and_decoder_layers(norm_first: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(6, 2, 1, 1, 8, dropout=0.0, batch_first=batch_first, norm_first=norm_first).double()
    optimizer = kfac(model, lr=0.01, batch_dim=int(not batch_first))
    assert optimizer.explain().covered == 1.0
    x, y = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x, y) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    samples = {name: float(block.store.samples[block.index]) for name, block in optimizer.blocks.items()}
    assert set(samples.values()) == {3.0 if batch_first else 5.0}
    assert losses[-1] < losses[0]
