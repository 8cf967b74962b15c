"""Common steps without their host code: no value is read, and replays go on where eager steps would."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_curv as tc
from tests.support.replay import Recording

BLIND = (
    "triton_curv.inverse.known_true",
    "triton_curv.blocks.bank.known_true",
    "triton_curv.blocks.centre.known_true",
    "triton_curv.blocks.samples.known_true",
    "triton_curv.blocks.shifts.known_true",
    "triton_curv.optimizers.apply.known_true",
    "triton_curv.optimizers.fallback.known_true",
    "triton_curv.optimizers.kfac.known_true",
    "triton_curv.optimizers.hyper.on_host",
    "triton_curv.optimizers.host_moves.on_host",
    "triton_curv_kernels.momentum.runs_on_host",
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at values to save work."""
    for look in BLIND:
        monkeypatch.setattr(look, lambda *_: False)
    monkeypatch.setattr("triton_curv.health.HealthMonitor.watch", lambda self: None)


class Net(nn.Module):
    """Blocks, a norm layer, and a parameter that the fallback trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x) * self.scale
        return y


def built(**options: Any) -> tuple[Net, tc.KFAC, Tensor]:
    """After three eager steps; the learning rate is a tensor."""
    torch.manual_seed(0)
    model, lr = Net(), torch.tensor(1e-2)
    optimizer = tc.KFAC(model, lr=lr, factor_interval=10**6, inverse_interval=10**6, **options)
    for seed in range(3):
        passes(model, seed)
        optimizer.step()
    return model, optimizer, lr


def passes(model: Net, seed: int) -> None:
    """Gradients in place: those of a CUDA graph stay where they are."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    model(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fallback": "sgd", "update_size": "kl_clip"},
        {"update_size": "none", "rescale": "paper", "reduction": "sum"},
    ],
    ids=["default", "kl-clip", "paper"],
)
def test_replays_are_eager_steps(options: dict[str, Any]) -> None:
    """With momentum as a float: the bias of its average is taken out on the device. The rate follows its tensor."""
    results = []
    for replays in (False, True):
        model, optimizer, lr = built(**options)
        passes(model, 3)
        recording = Recording()
        with recording:
            optimizer.step()
        for seed in range(4, 9):
            lr.fill_(1e-2 / seed)
            passes(model, seed)
            recording.replay() if replays else optimizer.step()
        assert optimizer._hyper.steps.item() == 9  # three, the recorded one, five: none counted on the host alone
        results.append([p.detach().clone() for p in model.parameters()])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


def test_a_read_value_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="read on the host"), Recording():
        torch.ones(()).item()
