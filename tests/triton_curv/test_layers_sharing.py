"""Weight sharing over positions, per-token losses and padding: expand, reduce, `KFAC.count`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss

import triton_curv as tc
from tests.support.capture import captured, kfac
from tests.support.dense import gauss_newton, gauss_newton_batch, gram, jacobian, kron, relative_error
from tests.support.units import observed, second_moment, with_ones

INPUTS, TIME = 12, 3


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def linear_stack(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, bias=bias), nn.Linear(4, 4, bias=bias)).double()


def product(block: Any) -> Tensor:
    factors = {key: factor[None] if factor.dim() == 2 else factor for key, factor in block.factors().items()}
    return kron(factors["G"], factors["A"])


def targets_at_positions(outputs: Tensor) -> Tensor:
    """(M, d, T, d): as in `gauss_newton_batch`, but with a basis for every position."""
    count, time, d = outputs.shape
    generator = torch.Generator().manual_seed(0)
    bases = torch.linalg.qr(torch.randn(count, time, d, d, generator=generator, dtype=outputs.dtype)).Q
    targets: Tensor = outputs[:, :, None, :] - d / 2**0.5 * bases.mT
    return targets.transpose(1, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(TIME,), (2, 2)])
def test_expand_is_exact_where_the_loss_sums_over_positions(bias: bool, shape: tuple[int, ...]) -> None:
    model = linear_stack(bias)
    x = torch.randn(INPUTS, *shape, 4, dtype=torch.float64) + 0.5
    with torch.no_grad():
        outputs = model(x).flatten(1, -2)
    time, d = outputs.shape[1:]
    y = targets_at_positions(outputs).flatten(0, 1)
    expected = {name: gram(jacobian(model, name, x, lambda out: out.flatten(1))) * (2 / d) for name in ("0", "1")}
    many = x.repeat_interleave(d, dim=0)
    optimizer = captured(model, lambda m: mse_loss(m(many).flatten(1, -2), y) * time)
    for name, block in optimizer.blocks.items():
        assert relative_error(product(block), expected[name]) < 1e-10


REDUCE: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), MeanOverPositions()), (TIME, 4)),
    "linear-4d": (lambda: nn.Sequential(nn.Linear(4, 4, bias=False), MeanOverPositions(), nn.Linear(4, 4)), (2, 2, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), Pool(), nn.Linear(3, 3)), (2, 4, 4)),
    "conv-groups": (lambda: nn.Sequential(nn.Conv1d(4, 4, 2, groups=2, bias=False), Pool()), (4, 5)),
}


@pytest.mark.parametrize("case", REDUCE.values(), ids=REDUCE.keys())
def test_reduce_is_exact_where_positions_are_averaged(
    case: tuple[Callable[[], nn.Sequential], tuple[int, ...]],
) -> None:
    torch.manual_seed(0)
    model = case[0]().double()
    inputs = torch.randn(INPUTS, *case[1], dtype=torch.float64) + 0.5
    x, y = gauss_newton_batch(model, inputs)
    names = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    expected = {name: gauss_newton(model, name, inputs) for name in names}
    optimizer = captured(model, lambda m: mse_loss(m(x), y), weight_sharing="reduce")
    assert "reduce" in optimizer.explain().rows[0].note
    for name, block in optimizer.blocks.items():
        assert relative_error(product(block), expected[name]) < 1e-10
    optimizer.detach()
    wrong = captured(model, lambda m: mse_loss(m(x), y))
    assert relative_error(product(wrong.blocks["0"]), expected["0"]) > 0.1


def test_sharing_is_chosen_by_pattern() -> None:
    model = linear_stack(True)
    optimizer = kfac(model, groups=[{"modules": "1", "weight_sharing": "reduce", "lr": 0.5}])
    notes = {row.parameter: row.note for row in optimizer.explain().rows}
    assert "reduce" in notes["1.weight"]
    assert "reduce" not in notes["0.weight"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 3e-2]
    with pytest.raises(tc.ConfigurationError, match="weight_sharing"):
        kfac(linear_stack(True), weight_sharing="shrink")
    with pytest.raises(tc.ConfigurationError, match="weight_sharing"):
        kfac(linear_stack(True), groups=[{"modules": "1", "weight_sharing": "shrink"}])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_time_first_inputs_equal_batch_first_ones(sharing: str) -> None:
    model = linear_stack(True)
    x, y = torch.randn(5, TIME, 4, dtype=torch.float64), torch.randn(5, TIME, 4, dtype=torch.float64)
    factors = []
    for flip in (False, True):
        inputs, targets = (x.transpose(0, 1), y.transpose(0, 1)) if flip else (x, y)
        optimizer = kfac(model, weight_sharing=sharing, batch_dim=int(flip))
        mse_loss(model(inputs), targets).backward()
        factors.append(optimizer.blocks["0"].factors())
        optimizer.detach()
    for name, value in factors[0].items():
        torch.testing.assert_close(factors[1][name], value, rtol=1e-12, atol=0)


# ---- per-token losses and masks


class Tagger(nn.Module):
    """A per-token classifier that looks at its neighbours by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, key_padding_mask=padding)[0]
        out: Tensor = self.head(self.norm(x))
        return out


def padded(time: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and mask of three sequences of 4, 2 and 3 tokens, padded to `time`; padding is not constant."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(0, 9, (3, 4), generator=generator), torch.randint(0, 4, (3, 4), generator=generator)
    mask = torch.arange(time) < torch.tensor([4, 2, 3])[:, None]
    more = time - 4
    noise = torch.randint(0, 9, (3, time))
    return torch.where(mask, functional.pad(tokens, (0, more)), noise), functional.pad(labels, (0, more)), mask


def tagger_factors(time: int, told: bool, sharing: str = "expand") -> tuple[Tagger, dict[tuple[str, str], Tensor]]:
    torch.manual_seed(0)
    model = Tagger().double()
    tokens, labels, mask = padded(time)
    optimizer = kfac(model, weight_sharing=sharing)
    if told:
        optimizer.count(mask=mask)
    cross_entropy(model(tokens, ~mask)[mask], labels[mask]).backward()
    return model, {(n, k): v for n, b in optimizer.blocks.items() for k, v in b.factors().items()}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padding_changes_nothing_once_the_mask_is_known(sharing: str) -> None:
    _, short = tagger_factors(4, told=True, sharing=sharing)
    _, long = tagger_factors(7, told=True, sharing=sharing)
    assert {name for name, _ in short} == {"embed", "attention", "attention.out_proj", "norm", "head"}
    for key, value in short.items():
        torch.testing.assert_close(long[key], value, rtol=1e-10, atol=1e-14)
    _, untold = tagger_factors(7, told=False, sharing=sharing)
    assert relative_error(untold["head", "A"], short["head", "A"]) > 0.05


def test_masked_factors_are_means_over_real_tokens() -> None:
    torch.manual_seed(0)
    model = Tagger().double()
    tokens, labels, mask = padded(6)
    inputs, signal = observed(model, "head", lambda m: cross_entropy(m(tokens, ~mask)[mask], labels[mask]))
    _, factors = tagger_factors(6, told=True)
    units = int(mask.sum())
    torch.testing.assert_close(factors["head", "A"], second_moment(with_ones(inputs[mask])), rtol=1e-10, atol=0)
    torch.testing.assert_close(factors["head", "G"], second_moment(signal[mask] * units), rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unmasked_tokens_are_counted_exactly_in_narrow_types(dtype: torch.dtype) -> None:
    """A sum of ones in fp16 is infinite from 65504 on, in bf16 it keeps 8 bits."""
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "attention": nn.MultiheadAttention(2, 1, batch_first=True)})
    model.to(dtype)
    mask = torch.arange(1000) < torch.arange(931, 1001)[:, None]
    assert int(mask.sum()) > 65504
    optimizer = kfac(model)
    optimizer.count(mask=mask)
    ones = torch.ones(70, 1000, 2, dtype=dtype)
    output = model["linear"](ones).float().sum(-1)
    query = torch.ones(70, 1, 2, dtype=dtype)  # few of them: 70 x 1000 x 1000 scores would take long
    output = output + model["attention"](query, ones, ones, need_weights=False)[0].float().sum(-1)
    ((output * mask).sum() / mask.sum()).backward()
    torch.testing.assert_close(optimizer.blocks["linear"].factors()["A"], torch.ones(3, 3))
    keys = optimizer.blocks["attention"].factors()["A"][1]
    torch.testing.assert_close(keys, torch.ones(3, 3), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("split", [[6], [2, 4], [1, 2, 3]])
def test_token_losses_have_one_scale_for_every_batch_and_length(split: list[int]) -> None:
    """Per-token losses: the same tokens as (6, 1), (3, 2), (2, 3) sequences or in micro-batches give the same G."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    reference = captured(model, lambda m: cross_entropy(m(x), y))
    expected = {name: block.factors() for name, block in reference.blocks.items()}
    reference.detach()
    for time in (1, 2, 3):
        if any(size % time for size in split):
            continue
        optimizer = kfac(model)
        for a, b in zip(x.split(split), y.split(split), strict=True):
            optimizer.count(len(a))
            scores = model(a.unflatten(0, (-1, time)))
            (cross_entropy(scores.flatten(0, 1), b, reduction="sum") / 6).backward()
        for name, block in optimizer.blocks.items():
            for key, value in block.factors().items():
                torch.testing.assert_close(value, expected[name][key], rtol=1e-10, atol=1e-14)
        optimizer.detach()


def test_count_speaks_of_one_step_only() -> None:
    model = linear_stack(True)
    x = torch.randn(4, TIME, 4, dtype=torch.float64)
    optimizer = kfac(model, lr=0.0, factor_decay=0.0)
    traces = []
    for units in (12.0, None):
        if units is not None:
            optimizer.count(units)
        model(x).square().mean().backward()
        traces.append(float(optimizer.blocks["0"].factors()["G"].trace()))
        optimizer.step()
        optimizer.zero_grad()
    assert traces[0] == pytest.approx(TIME * traces[1], rel=1e-12)
    with pytest.raises(tc.ConfigurationError, match="boolean"):
        optimizer.count(mask=torch.ones(4, TIME))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_that_fits_no_layer_is_an_error(compiled: bool) -> None:
    model = linear_stack(True)
    optimizer = kfac(model, lr=0.0)
    forward = torch.compile(model, backend="eager") if compiled else model
    x = torch.randn(4, TIME, 4, dtype=torch.float64)
    mask = torch.ones(4, TIME, dtype=torch.bool)
    for wrong in (mask[:, 1:], mask[:3], mask[..., None]):
        optimizer.count(mask=wrong)
        forward(x).square().mean().backward()
        with pytest.raises(tc.ConfigurationError, match=r"fits none of \['0'"):
            optimizer.step()
        optimizer.zero_grad()
        if compiled:  # what was traced is remembered
            torch._dynamo.reset()
            optimizer.detach()
            optimizer = kfac(model, lr=0.0)
    optimizer.count(mask=mask)
    forward(x).square().mean().backward()
    optimizer.step()


def test_a_mask_is_for_the_layers_that_have_its_positions() -> None:
    """The head sees samples alone; a convolution uses no mask, so that one of its pixels says N alone."""
    linear = nn.Linear(4, 4)
    optimizer = kfac(nn.ModuleList([linear, head := nn.Linear(4, 2)]), lr=0.0)
    optimizer.count(mask=torch.ones(5, TIME, dtype=torch.bool))
    head(linear(torch.randn(5, TIME, 4)).mean(1)).sum().backward()
    optimizer.step()
    conv = nn.Conv2d(1, 2, 3)
    optimizer = kfac(conv, lr=0.0)
    optimizer.count(mask=torch.ones(5, 4, 4, dtype=torch.bool))
    conv(torch.randn(5, 1, 6, 6)).mean().backward()
    optimizer.step()
    assert float(optimizer._store.samples) == 5 * 16
