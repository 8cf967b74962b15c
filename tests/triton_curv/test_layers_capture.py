"""Taps on attention, embeddings and norms: torch.compile, checkpointing, autocast, GradScaler, micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import triton_curv as tc
from tests.support.capture import kfac
from tests.support.dense import relative_error
from tests.support.transformer import Transformer, tokens

Factors = dict[tuple[str, str], Tensor]


def token_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(scores.flatten(0, 1), targets.flatten())


def factors_of(optimizer: tc.KFAC) -> Factors:
    return {(name, key): value for name, block in optimizer.blocks.items() for key, value in block.factors().items()}


def net(dtype: torch.dtype = torch.float64, **options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(**options).to(dtype)


def plain_factors(dtype: torch.dtype = torch.float64, **options: Any) -> Factors:
    model = net(dtype, **options)
    x, y = tokens()
    optimizer = kfac(model)
    token_loss(model(x), y).backward()
    return factors_of(optimizer)


def assert_close(actual: Factors, expected: Factors, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(actual[key], value) < tolerance, key


@pytest.mark.parametrize("recompute", ["", "not reentrant"])
def test_one_graph_for_each_state_and_the_factors_of_eager(recompute: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    x, y = tokens()
    model = net(recompute=recompute)
    optimizer = tc.KFAC(model, factor_interval=3, centred=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(5):
        token_loss(compiled(x), y).backward()
        if step == 0:
            assert_close(factors_of(optimizer), plain_factors(), 1e-12)
        optimizer.step()
        optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


class Small(nn.Module):
    """An embedding, attention and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        out: Tensor = self.norm(x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0])
        return out


def test_inductor_takes_the_factors_of_eager() -> None:
    torch._dynamo.reset()
    x, _ = tokens()
    model, twin = Small(), Small()
    compiled = torch.compile(model, fullgraph=True)  # before the optimizer, but not run yet
    factors = []
    for net, forward in ((model, compiled), (twin, twin)):
        optimizer = kfac(net)
        (forward(x) ** 3).flatten(1).sum(1).mean().backward()
        factors.append(factors_of(optimizer))
    assert_close(factors[0], factors[1], 1e-6)


def test_a_model_that_ran_compiled_before_the_optimizer() -> None:
    """The forward of an attention changes, which guards see: the new graph has all taps. Hooks alone they don't see."""
    torch._dynamo.reset()
    x, _ = tokens()
    factors = []
    for late in (False, True):
        model = Small()
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        if late:
            run(x).sum().backward()
            model.zero_grad()
        optimizer = kfac(model)
        (run(x) ** 3).flatten(1).sum(1).mean().backward()
        factors.append(factors_of(optimizer))
    assert_close(factors[1], factors[0], 1e-6)
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4))
    run = torch.compile(plain, backend="aot_eager", fullgraph=True)
    run(x).sum().backward()
    plain.zero_grad()
    optimizer = kfac(plain)
    run(x).sum().backward()
    with pytest.raises(tc.NoStatisticsError, match="compiled"):
        optimizer.step()


def test_masks_compile() -> None:
    torch._dynamo.reset()
    counters.clear()
    x, _ = tokens()
    real = torch.arange(6) < torch.tensor([6, 3, 4, 2, 5])[:, None]
    results = []
    for compiled in (False, True):
        model = Small().double()
        optimizer = kfac(model, lr=0.0)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for mask in (real, real.flip(0)):
            optimizer.count(mask=mask)
            ((run(x, ~mask) ** 3).sum(2) * mask).sum().div(mask.sum()).backward()
            results.append(factors_of(optimizer))
            optimizer.step()
            optimizer.zero_grad()
    assert_close(results[2], results[0], 1e-12)
    assert_close(results[3], results[1], 1e-12)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("recompute", ["reentrant", "not reentrant"])
def test_activation_checkpointing_counts_nothing_twice(recompute: str) -> None:
    assert_close(plain_factors(recompute=recompute), plain_factors(), 1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_micro_batches_equal_one_batch(tied: bool) -> None:
    x, y = tokens(6)
    expected = []
    for sizes in ([6], [1, 3, 2]):
        model = net(tied=tied)
        optimizer = kfac(model)
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
            (token_loss(model(a), b) * len(a) / 6).backward()
        expected.append(factors_of(optimizer))
    own = {key for key in expected[0] if key[0] != "place"}  # one row for each place, not for each sample
    assert_close({k: expected[1][k] for k in own}, {k: expected[0][k] for k in own}, 1e-10)


def test_two_forwards_before_one_backward_equal_one_batch() -> None:
    x, y = tokens(6)
    reference, model = net(), net()
    optimizers = [kfac(reference), kfac(model)]
    token_loss(reference(x), y).backward()
    losses = [token_loss(model(a), b) for a, b in zip(x.split(3), y.split(3), strict=True)]
    torch.stack(losses).mean().backward()
    expected, actual = map(factors_of, optimizers)
    own = {key for key in expected if key[0] != "place"}
    assert_close({k: actual[k] for k in own}, {k: expected[k] for k in own}, 1e-10)


class Twice(nn.Module):
    """A block that is called again and again, embeddings, a convolution and a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.norm = nn.Embedding(11, 4), nn.Conv1d(4, 4, 3, padding=1), nn.LayerNorm(4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.norm(self.mix(self.embed(tokens).mT).mT)
        for _ in range(3):
            x = self.block(x)
        return x


@pytest.mark.parametrize("compiles", ["model", "block"])
def test_compiled_calls_before_one_backward_lose_nothing(compiles: str) -> None:
    """torch.compile moves into the forward graph what needs no gradient; sums that were read there are old at the end.

    Two views of a contrastive loss, a discriminator's real and fake batches, a compiled block that is called twice.
    """
    first, second = tokens(5, 6)[0], tokens(5, 6, seed=1)[0]
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 2, 5])[:, None]
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = Twice().double()
        optimizer = kfac(model)
        run: Any = model
        if compiled and compiles == "model":
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
        elif compiled:
            model.block.compile(backend="aot_eager", fullgraph=True)
        optimizer.count(2 * int(mask.sum()), mask=mask)
        outputs = [run(batch) for batch in (first, second)]
        ((outputs[0] * outputs[1]).sum(2) * mask).sum().backward()
        results.append(factors_of(optimizer))
    assert_close(results[1], results[0], 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_grad_scaler_is_near_float64(dtype: torch.dtype) -> None:
    x, y = tokens(16)
    reference = net()
    expected = kfac(reference)
    token_loss(reference(x), y).backward()
    model = net(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = kfac(model, grad_scaler=scaler)
    with torch.autocast("cpu", dtype):
        loss = token_loss(model(x), y)
    scaler.scale(loss).backward()
    factors = {key: value.double() for key, value in factors_of(optimizer).items()}
    assert all(
        block.store.view("sums", key).dtype == torch.float32
        for block in optimizer.blocks.values()
        for key in block.keys.values()
    )
    assert_close(factors, factors_of(expected), 0.05 if dtype == torch.bfloat16 else 0.01)
    scaler.step(optimizer)
    scaler.update()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_an_infinite_gradient_of_a_grad_scaler_spoils_nothing() -> None:
    x, y = tokens()
    model = net(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = kfac(model, grad_scaler=scaler)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(token_loss(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(bool(value.isfinite().all()) for value in factors_of(optimizer).values())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_state_of_new_layers_goes_on_bit_for_bit() -> None:
    x, y = tokens()

    def advance(model: nn.Module, optimizer: tc.KFAC, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            token_loss(model(x), y).backward()
            optimizer.step()

    options: dict[str, Any] = {"lr": 0.01, "max_factor_dim": 7}
    model = net(torch.float32)
    optimizer = kfac(model, **options)
    advance(model, optimizer, 3)
    other = net(torch.float32)
    again = kfac(other, **options)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    advance(model, optimizer, 3)
    advance(other, again, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
