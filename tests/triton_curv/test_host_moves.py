"""Steps whose lengths are computed as Python numbers: the same as those of vectors of tensors."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import triton_curv as tc


class Net(nn.Module):
    """Wide and narrow layers, and a parameter that the fallback trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 70), nn.Tanh(), nn.LayerNorm(70), nn.Linear(70, 4, bias=False))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x) * self.scale
        return y


def trained(poison: bool = False, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Net()
    groups = [{"modules": "layers.3", "lr": 0.02, "momentum": 0.5}]
    optimizer = tc.KFAC(model, lr=0.1, groups=groups, **options)
    for step in range(5):
        x, y = torch.randn(30, 9), torch.randint(4, (30,))
        optimizer.zero_grad()
        cross_entropy(model(x * (torch.inf if poison and step == 2 else 1)), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore::triton_curv.NumericalWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_size": "rms", "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True, "nesterov": False},
        {"momentum": 0.0},
        {"poison": True, "rescale": "code"},
    ],
    ids=["default", "rms", "maximize", "no momentum", "not finite"],
)
def test_numbers_move_weights_as_tensors_do(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups, decay, a step that does not happen."""
    found = trained(**options)
    calls = []
    monkeypatch.setattr("triton_curv.optimizers.apply.moves_on_host", lambda *_: calls.append(1))
    expected = trained(**options)
    assert len(calls) == 5
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
