"""Sampled and exact Fisher against dense Gauss-Newton matrices; masks, tokens, the training gradient left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import triton_curv as tc
from tests.support.capture import kfac
from tests.support.dense import jacobian, join, kron, relative_error, weight_layers
from tests.support.small_net import batches, small_net, train, weights


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def hessian(loss: str, outputs: Tensor) -> Tensor:
    """Hessian of one sample's loss at each row of outputs, (N, d, d)."""
    d = outputs.shape[1]
    if loss == "mse":
        return (2 / d) * torch.eye(d, dtype=outputs.dtype).expand(len(outputs), d, d)
    p = outputs.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def dense_fisher(model: nn.Module, name: str, x: Tensor, loss: str) -> Tensor:
    """(1/N) sum_n J_n^T H_n J_n of one layer, (1, p, p)."""
    J = jacobian(model, name, x, lambda outputs: outputs).flatten(2)
    H = hessian(loss, model(x).detach())
    return torch.einsum("nkp,nkl,nlq->pq", J, H, J)[None] / len(x)


def sampled(model: nn.Module, x: Tensor, loss: Any, fisher: str = "exact", **options: Any) -> tc.KFAC:
    optimizer = kfac(model, fisher=fisher, **options)
    optimizer.sample_fisher(model(x), loss)
    optimizer.capture(False)  # taps and jacrev do not mix
    return optimizer


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_exact_fisher_of_one_datum_is_the_gauss_newton_block_of_the_head(loss: str) -> None:
    model, x = mlp(), torch.randn(1, 4, dtype=torch.float64)
    optimizer = sampled(model, x, loss)
    for name in weight_layers(model):
        factors = optimizer.blocks[name].factors()
        product = kron(factors["G"][None], factors["A"][None])
        assert relative_error(product, dense_fisher(model, name, x, loss)) < 1e-12


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_exact_factors_are_means_over_samples(loss: str) -> None:
    """G = (1/N) sum_n B_n^T H_n B_n, B_n the Jacobian of the outputs by the layer's bias; the head's B is I."""
    model, x = mlp(), torch.randn(7, 4, dtype=torch.float64)
    optimizer = sampled(model, x, loss)
    H = hessian(loss, model(x).detach())
    B = jacobian(model, "0", x, lambda outputs: outputs)[..., 0, :, -1]
    assert relative_error(optimizer.blocks["2"].factors()["G"], H.mean(0)) < 1e-12
    expected = torch.einsum("nki,nkl,nlj->ij", B, H, B) / len(x)
    assert relative_error(optimizer.blocks["0"].factors()["G"], expected) < 1e-12
    a = functional.pad(x, (0, 1), value=1.0)
    assert relative_error(optimizer.blocks["0"].factors()["A"], a.T @ a / len(x)) < 1e-12


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "distribution"])
def test_sampled_fisher_is_the_exact_one_on_average(loss: Any) -> None:
    model, x = mlp(), torch.randn(2, 4, dtype=torch.float64)
    kind = "cross_entropy" if loss == "distribution" else loss
    exact = sampled(model, x, kind)
    copies = x.repeat(20000, 1)
    optimizer = kfac(model, fisher="sampled")
    output = model(copies)
    optimizer.sample_fisher(output, torch.distributions.Categorical(logits=output) if kind != loss else loss)
    for name in weight_layers(model):
        for factor, value in exact.blocks[name].factors().items():
            assert relative_error(optimizer.blocks[name].factors()[factor], value) < 0.03


def test_one_draw_differs_from_the_empirical_fisher() -> None:
    model, x = mlp(), torch.randn(6, 4, dtype=torch.float64)
    draws = [sampled(model, x, "cross_entropy", "sampled").blocks["2"].factors()["G"] for _ in range(2)]
    assert torch.equal(*draws)  # the step alone decides
    y = torch.zeros(6, dtype=torch.int64)
    empirical = kfac(model)
    functional.cross_entropy(model(x), y).backward()
    assert relative_error(draws[0], empirical.blocks["2"].factors()["G"]) > 0.1


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_the_training_gradient_is_untouched_and_adds_nothing(fisher: str) -> None:
    model, x = mlp(), torch.randn(6, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (6,))
    optimizer = kfac(model, fisher=fisher)
    output = model(x)
    optimizer.sample_fisher(output, "cross_entropy")
    assert all(p.grad is None for p in model.parameters())
    before = optimizer.blocks["0"].factors()
    functional.cross_entropy(output, y).backward()
    expected = torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)
    for name, value in before.items():
        assert torch.equal(optimizer.blocks["0"].factors()[name], value)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch._functorch.config.patch(donated_buffer=False)  # type: ignore[untyped-decorator]  # torch's
def test_compiled_taps_give_the_sampled_statistics(backend: str) -> None:
    factors = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = small_net()
        optimizer = kfac(model, fisher="exact")
        run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        for x, y in batches(2):  # two micro-batches
            output = run(x)
            optimizer.sample_fisher(output, "cross_entropy")
            functional.cross_entropy(output, y).backward()
        optimizer.step()
        factors.append({n: b.factors() for n, b in optimizer.blocks.items()})
    for name, kinds in factors[0].items():
        for kind, value in kinds.items():
            torch.testing.assert_close(factors[1][name][kind], value, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_batch() -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    results = []
    for parts in (1, 2):
        model = mlp()
        optimizer = kfac(model, fisher="exact")
        for part in x.chunk(parts):
            optimizer.sample_fisher(model(part), "cross_entropy")
        results.append(optimizer.blocks["0"].factors())
    for name, value in results[0].items():
        assert relative_error(results[1][name], value) < 1e-12


class Tokens(nn.Module):
    """A linear layer on (batch, time, features), then logits of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inner(x)))
        return out


MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])


def tokens() -> tuple[Tokens, Tensor]:
    torch.manual_seed(0)
    return Tokens().double(), torch.randn(3, 3, 4, dtype=torch.float64)


def packed_reference(**options: Any) -> tuple[tc.KFAC, Tensor]:
    """The same net on the tokens that count, one sample each."""
    model, x = tokens()
    return kfac(model, **options), x[MASK]


def test_padding_does_not_count() -> None:
    model, x = tokens()
    optimizer = kfac(model, fisher="exact")
    optimizer.sample_fisher(model(x), "cross_entropy", mask=MASK)
    reference, flat = packed_reference(fisher="exact")
    reference.sample_fisher(reference._model(flat), "cross_entropy")
    for name, block in reference.blocks.items():
        for kind, value in block.factors().items():
            assert relative_error(optimizer.blocks[name].factors()[kind], value) < 1e-12


@pytest.mark.parametrize("how", ["mask", "number"])
def test_per_token_losses_with_ignore_index_are_normalised_by_their_tokens(how: str) -> None:
    model, x = tokens()
    y = torch.where(MASK, torch.randint(0, 3, (3, 3)), -100)
    optimizer = kfac(model)
    optimizer.count(mask=MASK) if how == "mask" else optimizer.count(int(MASK.sum()))
    functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    reference, flat = packed_reference()
    functional.cross_entropy(reference._model(flat), y[MASK]).backward()
    for name, block in reference.blocks.items():
        for kind, value in block.factors().items():
            if kind == "G" or how == "mask":
                assert relative_error(optimizer.blocks[name].factors()[kind], value) < 1e-12


def test_segmentation_logits_have_their_classes_in_dimension_one() -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(2, 3, 1)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    optimizer = kfac(conv, fisher="exact")
    optimizer.sample_fisher(conv(x), "cross_entropy", dim=1)
    H = hessian("cross_entropy", conv(x).detach().movedim(1, -1).flatten(0, 2))
    assert relative_error(optimizer.blocks["0"].factors()["G"], H.mean(0)) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, z: o.sample_fisher(z, "hinge"), "hinge"),
        (lambda o, z: o.sample_fisher(z.detach(), "mse"), "graph"),
        (lambda o, z: o.sample_fisher(z, "cross_entropy", mask=torch.ones(4, dtype=torch.bool)), "mask"),
        (lambda o, z: o.sample_fisher(z, torch.distributions.Normal(z, 1.0)), "sampled"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[tc.KFAC, Tensor], None], message: str) -> None:
    model = mlp()
    optimizer = kfac(model, fisher="exact")
    with pytest.raises(tc.ConfigurationError, match=message):
        call(optimizer, model(torch.randn(6, 4, dtype=torch.float64)))


def test_a_forgotten_call_is_an_error() -> None:
    model = small_net()
    with pytest.raises(tc.NoStatisticsError, match="sample_fisher"):
        train(model, tc.KFAC(model, fisher="sampled"), batches(1))
    with pytest.raises(tc.ConfigurationError, match="empirical"):
        tc.KFAC(model).sample_fisher(torch.zeros(1, 3), "mse")


def test_sampled_fisher_trains() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=1e-2, fisher="sampled", factor_interval=5)
    x, y = batches(1)[0]
    start = weights(model)
    losses = []
    for _ in range(80):
        output = model(x)
        optimizer.sample_fisher(output, "cross_entropy")
        loss = functional.cross_entropy(output, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert not torch.equal(start[0], weights(model)[0])


def test_join_of_the_heads_gradient_is_what_the_oracle_expects() -> None:
    """The oracle's bias column is the Jacobian by the bias: used above to read off B."""
    model, x = mlp(), torch.randn(2, 4, dtype=torch.float64)
    J = jacobian(model, "2", x, lambda outputs: outputs)[..., 0, :, -1]
    torch.testing.assert_close(J, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert join(model[2], model[2].weight, model[2].bias).shape == (1, 3, 6)  # type: ignore[arg-type]  # Sequential's items are Modules
