"""`triton-curv verify`: right on layers of all kinds, red on planted bugs, names what has no second derivative."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from triton_curv import ConfigurationError
from triton_curv.blocks import ConvRule, LayerNormRule
from triton_curv.blocks import block as block_file
from triton_curv.cli import main
from triton_curv.operators.ggn import GaussNewtonOperator
from triton_curv.operators.hvp import HessianOperator
from triton_curv.verification import Verdict, shrink, verify

HERE = "tests.triton_curv.test_verify"


class Zoo(nn.Module):
    """Convolutions of all sorts, norms, attention, dropout, a layer used twice, an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 32
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding="valid", dilation=2)
        self.bn = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, padding_mode="circular")
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=4, bias=False)
        self.gn = nn.GroupNorm(4, 64)
        self.up = nn.ConvTranspose2d(64, 32, 3, stride=2, output_padding=1)
        self.act = nn.ReLU(inplace=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(self.width, 16)
        self.twice = nn.Linear(16, 16)
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = self.gn(self.grouped(self.depthwise(x) + x))
        x = self.up(functional.avg_pool2d(functional.gelu(x), 4)).flatten(2).mT
        x = x.reshape(len(x), -1, self.width)
        x = x + self.attention(x, x, x)[0]
        x = self.fc(self.dropout(self.norm(x)).mean(1))
        y: Tensor = self.twice(torch.tanh(self.twice(x))) * self.gain
        return y


class Language(nn.Module):
    """Tokens and positions, a head tied to the tokens; positions fix no length."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 64), nn.Embedding(128, 64)
        self.mix = nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        y: Tensor = self.head(torch.tanh(self.mix(x)))
        return y


class Once(torch.autograd.Function):
    """Doubles, and can't be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Once.apply(x)  # type: ignore[no-untyped-call]  # torch's
        return y


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 2))


def with_doubling() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), Doubling(), nn.ReLU(inplace=True), nn.Linear(8, 3))


def verdict_of(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> Verdict:
    torch.manual_seed(0)
    return verify(shrink(model, (5, *shape), (dtype,)), "net")


def test_layers_of_all_kinds_are_right() -> None:
    verdict = verdict_of(Zoo(), 3, 64, 64)
    assert verdict.divisor > 1
    assert verdict.input_shape == (5, 3, 32, 32)
    rows = {row.block: row for row in verdict.blocks}
    layers = {
        "stem",
        "bn",
        "depthwise",
        "grouped",
        "gn",
        "up",
        "attention",
        "attention.out_proj",
        "norm",
        "fc",
        "twice",
    }
    assert set(rows) == layers
    assert all(row.ok and row.factors is not None and row.solve is not None for row in rows.values())
    assert set(verdict.loose) == {"gain", "up.bias"}
    assert [product.ok for product in verdict.products] == [True, True]
    assert verdict.ok


def test_tied_tokens_stay_tied_and_the_model_stays_as_it_was() -> None:
    model = Language()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    small = shrink(model, (5, 100), (torch.int64,))
    assert isinstance(small.model, Language)
    assert small.model.head.weight is small.model.tokens.weight
    assert small.inputs.shape == (5, 8)
    verdict = verify(small, "net")
    assert verdict.ok
    assert all(row.factors is not None and row.solve is not None for row in verdict.blocks)
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert not model.mix._forward_hooks


def test_wide_layers_are_narrowed_by_one_divisor_and_what_does_not_divide_stays() -> None:
    small = shrink(nn.Sequential(nn.Linear(100, 1024), nn.ReLU(), nn.Linear(1024, 7)), (5, 100), (torch.float32,))
    assert small.divisor == 8  # the bias makes 257 of 256
    assert [tuple(p.shape) for p in small.model.parameters()] == [(128, 100), (128,), (7, 128), (7,)]


def test_a_forward_that_insists_on_its_width_is_taken_as_it_is() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 512), nn.Linear(512, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).reshape(-1, 512))
            return y

    assert shrink(Stubborn(), (3, 4), (torch.float32,)).divisor == 1


def test_a_gap_is_zero_where_kronecker_is_exact() -> None:
    torch.manual_seed(0)
    small = shrink(nn.Sequential(nn.Linear(4, 3)), (1, 4), (torch.float32,))
    (row,) = verify(small, "net").blocks
    assert row.gap == pytest.approx(0.0, abs=1e-7)
    (row,) = verdict_of(nn.Sequential(nn.Linear(4, 3)), 4).blocks
    assert row.gap is not None
    assert row.gap > 0.1


def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict_of(small_net(), 2, 4).ok

    def broken(owner: Any, name: str, change: Any) -> Verdict:
        right = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *given: change(right, *given))
            return verdict_of(small_net(), 2, 4)

    def shifted(right: Any, rule: ConvRule, sums: Any, inputs: Tensor, *rest: Any) -> Any:
        return right(rule, sums, inputs.roll(1, -1), *rest)

    def unnormalised(right: Any, rule: LayerNormRule, inputs: Tensor, training: bool) -> Tensor:
        return inputs

    def halved(right: Any, operator: Any, matrix: Tensor, out: Tensor) -> None:
        right(operator, matrix, out)
        out.mul_(0.5)

    def scaled(right: Any, operator: Any, vectors: Any) -> Any:
        return [1.01 * part for part in right(operator, vectors)]

    wrong = broken(ConvRule, "accumulate_", shifted)
    assert [row.block for row in wrong.blocks if not row.ok] == ["0"]
    wrong = broken(LayerNormRule, "normalised", unnormalised)
    assert [row.block for row in wrong.blocks if not row.ok] == ["3"]
    wrong = broken(block_file, "solve", halved)
    assert all(row.factors is not None and row.factors < 1e-12 and not row.ok for row in wrong.blocks)
    for index, operator in enumerate((HessianOperator, GaussNewtonOperator)):
        wrong = broken(operator, "__call__", scaled)
        assert [product.ok for product in wrong.products] == [index != 0, index != 1]
        assert not wrong.ok


def test_a_dead_layer_is_no_failure() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # type: ignore[operator]  # a Parameter
    verdict = verdict_of(model, 4)
    assert verdict.ok
    assert verdict.blocks[0].gap is None


def test_ops_without_second_derivatives_are_named_with_their_layer() -> None:
    hessian, gauss_newton = verdict_of(with_doubling(), 6).products
    assert (hessian.error, hessian.op, hessian.layers) == (None, "Once", ("1",))
    assert gauss_newton.op == "Once"


def test_a_model_that_does_not_run_is_a_named_error() -> None:
    with pytest.raises(ConfigurationError, match="does not run on an input of shape"):
        shrink(small_net(), (5, 3, 4), (torch.float32,))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{HERE}:with_doubling", "--input", "6"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 blocks compared are right, of 2 in all" in shown
    assert "Hessian (NewtonCG): not available, Once has no second derivative (layers: 1)" in shown
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_file, "solve", lambda operator, matrix, out: out.copy_(matrix))
        assert main(["verify", f"{HERE}:with_doubling", "--input", "6", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert len(told["blocks"]) == 2
