"""Transposed layers, registered blocks, adapters, frozen and unused parameters."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.modules.conv import _ConvTransposeNd

import triton_curv as tc
from tests.support.capture import captured, kfac
from tests.support.dense import damped_kron, gauss_newton_batch, relative_error, solve
from tests.support.units import observed, second_moment
from triton_curv.blocks import registry

# ---- Hugging Face's Conv1D


class Conv1D(nn.Module):
    """`transformers.pytorch_utils.Conv1D`: y = x W + b with W (d_in, d_out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"


@pytest.mark.parametrize("width", [3, 4])
def test_transposed_weights_equal_a_linear_layer(width: int) -> None:
    """Also where W is square, so that a transposed factor would fit."""
    torch.manual_seed(0)
    ours, twin = Conv1D(width, 4).double(), nn.Linear(4, width).double()
    twin.weight.data.copy_(ours.weight.T)
    twin.bias.data.copy_(ours.bias)
    x, y = torch.randn(5, 2, 4, dtype=torch.float64), torch.randn(5, 2, width, dtype=torch.float64)
    optimizers = [captured(model, lambda m: mse_loss(m(x), y), damping=0.1) for model in (ours, twin)]
    for optimizer in optimizers:
        optimizer.refresh()
    blocks = [optimizer.blocks[""] for optimizer in optimizers]
    for key, value in blocks[1].factors().items():
        torch.testing.assert_close(blocks[0].factors()[key], value)
    gradient = {"weight": torch.randn(4, width, dtype=torch.float64), "bias": torch.randn(width, dtype=torch.float64)}
    solution = blocks[0].precondition(gradient)
    expected = blocks[1].precondition({**gradient, "weight": gradient["weight"].T})
    torch.testing.assert_close(solution["weight"], expected["weight"].T)
    torch.testing.assert_close(solution["bias"], expected["bias"])
    for optimizer in optimizers:
        optimizer.detach()
        rescaled = kfac(optimizer._model, lr=0.1, rescale="paper")
        mse_loss(optimizer._model(x), y).backward()
        rescaled.step()
    torch.testing.assert_close(ours.weight.T, twin.weight)
    torch.testing.assert_close(ours.weight.norm(), torch.tensor((2.0 * width) ** 0.5, dtype=torch.float64))
    if width == 4:  # the bug of a library that takes it for a linear layer
        wrong = blocks[1].precondition(gradient)
        assert relative_error(wrong["weight"], solution["weight"]) > 0.1
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(ours.weight.T, twin.weight)


# ---- registration


def test_the_example_of_register_block() -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    (example,) = finder.find(registry.register_block, "register_block", globs={})
    assert len(example.examples) > 5
    assert runner.run(example).failed == 0


class OwnLinear(nn.Linear):
    pass


def test_registration_by_class_by_name_and_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    model = nn.Sequential(OwnLinear(3, 3), nn.Linear(3, 1))
    assert f"no block for {__name__}.OwnLinear" in kfac(model).explain().rows[-1].note
    tc.register_block(OwnLinear, tc.blocks.DenseRule)
    assert set(kfac(model).blocks) == {"0", "1"}
    tc.register_block(OwnLinear, lambda module, params, options: "ours is not ready")
    assert "ours is not ready" in kfac(model).explain().rows[-1].note
    monkeypatch.setattr(registry, "_registered", {})
    tc.register_block(f"{OwnLinear.__module__}.OwnLinear", tc.blocks.DenseRule)
    assert set(kfac(model).blocks) == {"0", "1"}
    model[0].weight.requires_grad_(False)
    assert "frozen" in kfac(model).explain().rows[-1].note
    for wrong in ("OwnLinear", int, OwnLinear(2, 2)):
        with pytest.raises(tc.ConfigurationError, match=r"subclass of nn\.Module"):
            tc.register_block(wrong, tc.blocks.DenseRule)  # type: ignore[arg-type]  # the point


# ---- transposed convolutions

TRANSPOSED: dict[str, tuple[Callable[[], _ConvTransposeNd], tuple[int, ...]]] = {
    "1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "1d-large-output-padding": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=1, dilation=3, output_padding=2), (2, 4)),
    "2d": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(2, 1), padding=(0, 1)), (2, 3, 4)),
    "2d-dilation": (lambda: nn.ConvTranspose2d(2, 2, 2, dilation=2, bias=False), (2, 2, 3)),
    "3d": (lambda: nn.ConvTranspose3d(2, 2, (2, 1, 2)), (2, 2, 2, 1)),
}


def transposed_factors(layer: _ConvTransposeNd, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A and G (in the order of weight[0].flatten()) by loops; g (N, out, *sizes) of the sum of losses."""
    dims = x.dim() - 2
    kernel, stride = [int(k) for k in layer.kernel_size], layer.stride
    padding, dilation = [int(p) for p in layer.padding], layer.dilation
    places: list[tuple[int, ...]] = list(itertools.product(*(range(int(size)) for size in x.shape[2:])))
    offsets: list[tuple[int, ...]] = list(itertools.product(*(range(k) for k in kernel)))
    rows_x, rows_g = [], []
    for n, where in itertools.product(range(len(x)), places):
        rows_x.append(x[n].flatten(1)[:, places.index(where)])
        patch = torch.zeros(g.shape[1], len(offsets), dtype=g.dtype)
        for i, offset in enumerate(offsets):
            target = [where[d] * stride[d] - padding[d] + offset[d] * dilation[d] for d in range(dims)]
            if all(0 <= t < size for t, size in zip(target, g.shape[2:], strict=True)):
                pixel = g[n]
                for t in target:
                    pixel = pixel[:, t]
                patch[:, i] = pixel
        rows_g.append(patch.flatten())
    A, G = second_moment(torch.stack(rows_x)), second_moment(torch.stack(rows_g))
    return A, G * len(rows_g) / len(x)


@pytest.mark.parametrize("case", TRANSPOSED.values(), ids=TRANSPOSED.keys())
def test_transposed_convolutions(case: tuple[Callable[[], _ConvTransposeNd], tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    layer = case[0]()
    model = nn.Sequential(layer, nn.Tanh()).double()
    x = torch.randn(3, *case[1], dtype=torch.float64)

    def loss(m: nn.Module) -> Tensor:
        value: Tensor = (m(x) ** 3).flatten(1).sum(1).mean()
        return value

    _, g = observed(model, "0", loss)
    A, G = transposed_factors(layer, x, g * len(x))
    optimizer = captured(model, loss, damping=0.1)
    factors = optimizer.blocks["0"].factors()
    torch.testing.assert_close(factors["A"], A, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(factors["G"], G, rtol=1e-10, atol=1e-13)
    optimizer.refresh()
    gradient = torch.randn_like(layer.weight)
    solution = optimizer.blocks["0"].precondition({"weight": gradient})["weight"]
    expected = solve(damped_kron(A[None], G[None], 0.1), gradient.flatten(1).T[None])[0].T.view_as(gradient)
    assert relative_error(solution, expected) < 1e-8
    if layer.bias is not None:
        assert "does not cover" in optimizer.explain().rows[-1].note
    optimizer.step()


def test_transposed_convolution_of_one_pixel_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 2, 2, bias=False), nn.Flatten()).double()
    inputs = torch.randn(20, 3, 1, 1, dtype=torch.float64)
    x, y = gauss_newton_batch(model, inputs)
    own = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)))({"0.weight": model[0].weight})
    rows = own["0.weight"].flatten(0, 1).flatten(1).detach()
    dense = second_moment(rows) * rows.shape[0] / len(inputs) * (2 / 8)
    factors = captured(model, lambda m: mse_loss(m(x), y)).blocks["0"].factors()
    assert relative_error(torch.kron(factors["A"], factors["G"]), dense) < 1e-10


def test_grouped_transposed_convolutions_say_why_they_have_no_block() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 1, 1))
    rows = {row.parameter: row for row in kfac(model).explain().rows}
    assert rows["0.weight"].trainer == "adamw"
    assert "groups" in rows["0.weight"].note


# ---- adapters, frozen and unused parameters


class LowRank(nn.Module):
    """A frozen linear layer with a trainable low-rank correction, the second factor zero at first."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def test_low_rank_adapters_train_on_a_frozen_base() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(nn.Linear(6, 5), 2), nn.Tanh(), LowRank(nn.Linear(5, 3), 2)).double()
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    optimizer = kfac(model, lr=0.01)
    assert set(optimizer.blocks) == {"0.down", "0.up", "2.down", "2.up"}
    assert len(optimizer.explain().rows) == 4
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(
        torch.equal(a, b) for a, b in zip(frozen, [p for p in model.parameters() if not p.requires_grad], strict=True)
    )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(bool(model.get_parameter(name).isfinite().all()) for name in names)


@pytest.mark.parametrize("kind", ["linear", "norm", "embedding"])
def test_frozen_and_unused_parameters(kind: str) -> None:
    torch.manual_seed(0)
    layer = {"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "embedding": nn.Embedding(4, 4)}[kind]
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": layer, "other": nn.LayerNorm(4)})
    model["other"].bias.requires_grad_(False)
    optimizer = kfac(model, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model["other"](model["used"](torch.randn(3, 4))).square().sum().backward()
        optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"other.bias", *(f"idle.{name}" for name, _ in layer.named_parameters())}
    assert optimizer.blocks["other"].factors()["F"].shape == (4, 1, 1)
    with pytest.raises(tc.NoStatisticsError, match="idle"):
        optimizer.blocks["idle"].factors()
