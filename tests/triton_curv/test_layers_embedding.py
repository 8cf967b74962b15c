"""Embeddings against linear layers on one-hot vectors; tied weights; factors that are too large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

import triton_curv as tc
from tests.support.capture import captured, kfac
from tests.support.dense import damped_kron, relative_error, solve
from tests.support.units import observed, second_moment, with_ones

VOCABULARY, WIDTH = 7, 4


def tokens(*shape: int) -> Tensor:
    """Tokens 0 to 4 of 7: two never occur."""
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))


def embedding_net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH, **options), nn.Tanh(), nn.Linear(WIDTH, 3)).double()


@pytest.mark.parametrize("shape", [(6,), (4, 3), (2, 3, 2)])
def test_embedding_is_a_linear_layer_on_one_hot_vectors(shape: tuple[int, ...]) -> None:
    embedding = embedding_net()
    twin = nn.Sequential(nn.Linear(VOCABULARY, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, 3)).double()
    state = embedding.state_dict()
    twin.load_state_dict({**state, "0.weight": state["0.weight"].T})
    x, y = tokens(*shape), torch.randn(*shape, 3, dtype=torch.float64)
    optimizers = [
        captured(embedding, lambda m: mse_loss(m(x), y), damping=0.01, update_size="rms"),
        captured(twin, lambda m: mse_loss(m(one_hot(x, VOCABULARY).double()), y), damping=0.01, update_size="rms"),
    ]
    ours, reference = (optimizer.blocks["0"].factors() for optimizer in optimizers)
    torch.testing.assert_close(torch.diag(ours["A"]), reference["A"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ours["G"], reference["G"], rtol=1e-12, atol=1e-15)
    for optimizer in optimizers:
        optimizer.refresh()
    gradient = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    solution = optimizers[0].blocks["0"].precondition({"weight": gradient})["weight"]
    expected = optimizers[1].blocks["0"].precondition({"weight": gradient.T})["weight"].T
    torch.testing.assert_close(solution, expected, rtol=1e-9, atol=1e-12)
    for optimizer, model in zip(optimizers, (embedding, twin), strict=True):
        optimizer.step()
        model.zero_grad()
    state = embedding.state_dict()
    torch.testing.assert_close(state["0.weight"].T, twin.state_dict()["0.weight"], rtol=1e-9, atol=1e-12)


def test_rows_without_tokens_do_not_move() -> None:
    model = embedding_net()
    before = model.state_dict()["0.weight"].clone()
    optimizer = captured(model, lambda m: mse_loss(m(tokens(9)), torch.ones(9, 3, dtype=torch.float64)))
    optimizer.step()
    moved = (model.state_dict()["0.weight"] != before).any(1)
    assert moved.tolist() == [bool((tokens(9) == t).any()) for t in range(VOCABULARY)]


def test_padding_tokens_take_no_part() -> None:
    model = embedding_net(padding_idx=0)
    x, y = tokens(4, 3), torch.randn(4, 3, 3, dtype=torch.float64)
    assert (x == 0).any()
    _, signal = observed(model, "0", lambda m: mse_loss(m(x), y))
    optimizer = captured(model, lambda m: mse_loss(m(x), y))
    factors = optimizer.blocks["0"].factors()
    real = x != 0
    frequencies = one_hot(x[real], VOCABULARY).double().mean(0)
    torch.testing.assert_close(factors["A"], frequencies)
    expected = second_moment(signal[real]) * int(real.sum()) * len(x)
    torch.testing.assert_close(factors["G"], expected, rtol=1e-10, atol=0)
    before = model.state_dict()["0.weight"][0].clone()
    optimizer.step()
    assert torch.equal(model.state_dict()["0.weight"][0], before)


def test_sparse_gradients_are_refused() -> None:
    with pytest.raises(tc.SparseGradientError, match=r"'0'.*sparse=False"):
        kfac(embedding_net(sparse=True))


def test_scaled_gradients_have_no_block_and_say_why() -> None:
    optimizer = kfac(embedding_net(scale_grad_by_freq=True))
    row = optimizer.explain().rows[-1]
    assert (row.parameter, row.trainer) == ("0.weight", "adamw")
    assert "scale_grad_by_freq" in row.note


# ---- tied weights


class Tied(nn.Module):
    """Embedding, a layer, and a head of the same weight."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(self.embed(x)).tanh())
        return out


def token_loss(model: nn.Module) -> Tensor:
    x = tokens(5, 3)
    return cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten())


def test_embedding_and_head_share_one_block_of_their_summed_curvature() -> None:
    model = Tied()
    x = tokens(5, 3)
    _, g1 = observed(model, "embed", token_loss)
    a2, g2 = observed(model, "head", token_loss)
    g1, g2, a2 = g1.flatten(0, 1), g2.flatten(0, 1), a2.flatten(0, 1)
    uses = [(one_hot(x.flatten(), VOCABULARY).double(), g1), (g2, a2)]
    dense = len(x) * sum(torch.einsum("ri,rj,rk,rl->ikjl", v, v, w, w) for v, w in uses)  # vocabulary, width, twice
    vocabulary, width = torch.einsum("ikjk->ij", dense).diagonal().diag(), torch.einsum("ikil->kl", dense)
    total = vocabulary.trace()
    width = width / total
    optimizer = captured(model, token_loss, damping=0.01)
    assert set(optimizer.blocks) == {"embed", "hidden"}
    factors = optimizer.blocks["embed"].factors()
    torch.testing.assert_close(torch.diag(factors["G"]), vocabulary, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(factors["A"], width, rtol=1e-9, atol=1e-14)
    assert float(factors["G"].sum() * factors["A"].trace()) == pytest.approx(float(total), rel=1e-10)
    optimizer.refresh()
    gradient = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    solution = optimizer.blocks["embed"].precondition({"weight": gradient})["weight"]
    expected = solve(damped_kron(width[None], vocabulary[None], 0.01), gradient[None])[0]
    assert relative_error(solution, expected) < 1e-8
    before = model.embed.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.embed.weight, before)
    assert model.head.weight is model.embed.weight


def test_the_bias_of_a_tied_head_says_why_it_has_no_block() -> None:
    rows = {row.parameter: row for row in kfac(Tied(bias=True)).explain().rows}
    assert rows["embed.weight"].trainer == "kfac"
    assert "one Kronecker product for embedding and head" in rows["embed.weight"].note
    assert rows["head.bias"].trainer == "adamw"
    assert "shared weight" in rows["head.bias"].note


def test_linear_layers_with_one_weight_are_one_layer_called_twice() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, WIDTH, dtype=torch.float64), torch.randn(6, WIDTH, dtype=torch.float64)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.layer(x).tanh())
            return out

    once = Twice().double()
    tied = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()
    tied[0].load_state_dict(once.layer.state_dict())
    tied[2].weight, tied[2].bias = tied[0].weight, tied[0].bias
    reference = captured(once, lambda m: mse_loss(m(x), y)).blocks["layer"].factors()
    optimizer = captured(tied, lambda m: mse_loss(m(x), y))
    assert set(optimizer.blocks) == {"0"}
    for name, value in optimizer.blocks["0"].factors().items():
        torch.testing.assert_close(value, reference[name], rtol=1e-12, atol=1e-15)


def test_weights_shared_by_unlike_layers_say_why_they_have_no_block() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(2, 2, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    model[3].weight = model[2].weight
    rows = {row.parameter: row for row in kfac(model).explain().rows}
    assert "no block for Bilinear" in rows["1.weight"].note
    assert "shared between '2' and '3'" in rows["2.weight"].note


# ---- large factors


def blocks_of(matrix: Tensor, sizes: list[int]) -> list[Tensor]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [matrix[e - n : e, e - n : e] for e, n in zip(ends, sizes, strict=True)]


SPLITS = {
    # fan-in with bias 11, limit: sizes of the blocks of A; fan-out 6: of G
    "whole": (11, [11], [6]),
    "uneven": (6, [6, 5], [6]),
    "both": (4, [4, 4, 3], [3, 3]),
    "four": (3, [3, 3, 3, 2], [3, 3]),
    "diagonal": (2, [1] * 11, [2, 2, 2]),
    "both-diagonal": (1, [1] * 11, [1] * 6),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_split_factors_are_the_blocks_of_whole_ones(
    kind: str, split: tuple[int, list[int], list[int]], sharing: str
) -> None:
    limit, sizes_A, sizes_G = split
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(10, 6) if kind == "linear" else nn.Conv1d(10, 6, 1)
    x = torch.randn(40, 3, 10, dtype=torch.float64)
    x = x if kind == "linear" else x.mT
    model = layer.double()
    whole = captured(model, lambda m: (m(x) ** 3).mean(), weight_sharing=sharing)
    A, G = (whole.blocks[""].factors()[name] for name in ("A", "G"))
    whole.detach()
    model.zero_grad()
    optimizer = captured(model, lambda m: (m(x) ** 3).mean(), weight_sharing=sharing, max_factor_dim=limit, damping=0.1)
    factors = optimizer.blocks[""].factors()
    for letter, full, sizes in (("A", A, sizes_A), ("G", G, sizes_G)):
        parts = [factors[key] for key in sorted(factors) if key[0] == letter]
        got = [m for part in parts for m in (part if part.dim() == 3 else part[None] if part.dim() == 2 else part)]
        for value, expected in zip(got, blocks_of(full, sizes), strict=True):
            torch.testing.assert_close(value.reshape(expected.shape), expected, rtol=1e-10, atol=1e-14)
    note = optimizer.explain().rows[0].note
    assert ("split" in note or "diagonal (" in note) == (limit < 11)
    optimizer.refresh()
    dense_A, dense_G = (torch.block_diag(*blocks_of(m, s)) for m, s in ((A, sizes_A), (G, sizes_G)))
    gradient = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    theta = torch.cat([gradient["weight"].flatten(1), gradient["bias"][:, None]], dim=1)
    expected = solve(damped_kron(dense_A[None], dense_G[None], 0.1), theta[None])[0]
    solution = optimizer.blocks[""].precondition(gradient)
    value = torch.cat([solution["weight"].flatten(1), solution["bias"][:, None]], dim=1)
    assert relative_error(value, expected) < 1e-8


@pytest.mark.parametrize("limit", [3, 1])
def test_split_factors_of_groups(limit: int) -> None:
    """Groups and blocks together: every group's factors are split the same way."""
    torch.manual_seed(0)
    model = nn.Conv1d(8, 8, 1, groups=2).double()
    x = torch.randn(30, 8, 2, dtype=torch.float64)
    whole = captured(model, lambda m: (m(x) ** 3).mean(), damping=0.1)
    A, G = (whole.blocks[""].factors()[name] for name in ("A", "G"))
    whole.detach()
    model.zero_grad()
    optimizer = captured(model, lambda m: (m(x) ** 3).mean(), max_factor_dim=limit, damping=0.1)
    optimizer.refresh()
    gradient = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    theta = torch.cat([gradient["weight"].flatten(1), gradient["bias"][:, None]], dim=1).view(2, 4, 5)
    sizes_A, sizes_G = ([3, 2], [2, 2]) if limit == 3 else ([1] * 5, [1] * 4)
    dense_A, dense_G = (
        torch.stack([torch.block_diag(*blocks_of(m, sizes)) for m in factor])
        for factor, sizes in ((A, sizes_A), (G, sizes_G))
    )
    expected = solve(damped_kron(dense_A, dense_G, 0.1), theta).view(8, 5)
    solution = optimizer.blocks[""].precondition(gradient)
    value = torch.cat([solution["weight"].flatten(1), solution["bias"][:, None]], dim=1)
    assert relative_error(value, expected) < 1e-8


def test_a_large_vocabulary_takes_memory_in_proportion() -> None:
    model = nn.Sequential(nn.Embedding(50_000, 4), nn.Linear(4, 50_000))
    optimizer = kfac(model)
    numbers = sum(
        tensor.numel() for bank in optimizer._store.banks for tensor in (bank.sums, bank.averages, bank.inverses)
    )
    assert numbers < 10 * 50_000
    x = torch.tensor([1, 49_999])
    cross_entropy(model(x), x).backward()
    optimizer.step()
    notes = {row.parameter: row for row in optimizer.explain().rows}
    assert "G diagonal (50000 coordinates)" in notes["1.weight"].note
    assert notes["0.weight"].factor_bytes < 4 * 50_000 * 4
    assert "KiB" in str(optimizer.explain())
    assert all(p.isfinite().all() for p in model.parameters())


def test_splitting_is_chosen_by_pattern() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = kfac(model, groups=[{"modules": "1", "max_factor_dim": 4}])
    notes = {row.parameter: row.note for row in optimizer.explain().rows}
    assert "A split into 2 diagonal blocks (8 coordinates)" in notes["1.weight"]
    assert "split" not in notes["0.weight"]
    with pytest.raises(tc.ConfigurationError, match="max_factor_dim"):
        kfac(model, max_factor_dim=0)


def test_the_bias_column_of_a_linear_layer_lies_in_the_last_block() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    factors = captured(model, lambda m: m(x).square().mean(), max_factor_dim=4).blocks[""].factors()
    whole = second_moment(with_ones(x))
    assert factors["A"].shape == (2, 3, 3)
    torch.testing.assert_close(factors["A"][1], whole[3:, 3:])


class Positions(nn.Module):
    """Tokens and positions, (T,) or (1, T), whose embedding is added to all samples; or (N, T), one for each."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape
        self.tokens, self.positions, self.head = nn.Embedding(6, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        if self.shape != "T":
            places = places.expand(len(x) if self.shape == "NT" else 1, -1)
        out: Tensor = self.head(torch.tanh(self.tokens(x) + self.positions(places)))
        return out


@pytest.mark.parametrize("shape", ["T", "1T"])
@pytest.mark.parametrize("units", [None, 20])
def test_positions_of_a_whole_batch_have_its_number_of_samples(shape: str, units: int | None) -> None:
    """G = N sum over t of g_t g_t^T, g_t the gradient of the mean loss: of N uncorrelated samples, what theirs is."""
    torch.manual_seed(0)
    model = Positions(shape).double()
    x, y = torch.randint(0, 6, (8, 5)), torch.randint(0, 3, (8, 5))
    optimizer = kfac(model)
    assert "fed without a batch" not in str(optimizer.explain())
    if units is not None:
        optimizer.count(units)
    cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    gradients = model.positions.weight.grad
    assert gradients is not None
    factors = optimizer.blocks["positions"].factors()
    torch.testing.assert_close(factors["G"], (units or 8) * gradients.T @ gradients, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(factors["A"], torch.full((5,), 0.2, dtype=torch.float64))
    notes = {row.parameter: row.note for row in optimizer.explain().rows}
    assert "fed without a batch" in notes["positions.weight"]
    assert "fed without a batch" not in notes["tokens.weight"]


def test_positions_of_a_whole_batch_estimate_those_of_its_samples() -> None:
    """Of targets drawn from the model gradients are uncorrelated: both ways to feed positions agree on average."""
    torch.manual_seed(0)
    model = Positions("T").double()
    traces = []
    for shape in ("T", "NT"):
        model.shape, total = shape, 0.0
        for seed in range(60):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randint(0, 6, (16, 5), generator=generator)
            with torch.no_grad():
                y = torch.multinomial(model(x).flatten(0, 1).softmax(-1), 1, generator=generator)[:, 0]
            optimizer = kfac(model)
            cross_entropy(model(x).flatten(0, 1), y).backward()
            total += float(optimizer.blocks["positions"].factors()["G"].trace())
            optimizer.detach()
        traces.append(total)
    assert 0.85 < traces[0] / traces[1] < 1.15, traces
