"""The optimizers on the device: the CPU reference's results, and the same bits in every run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from triton.runtime.jit import JITFunction

import triton_curv as tc

STEPS = 8
Build = Callable[[nn.Module], torch.optim.Optimizer]

GRADIENT: dict[str, Build] = {
    "kfac": lambda model: tc.KFAC(model, lr=1e-2, factor_interval=2, inverse_interval=3),
    "kfac-kl-clip": lambda model: tc.KFAC(model, lr=1e-2, damping=1e-2, update_size="kl_clip", weight_decay=1e-2),
    "neumann": lambda model: tc.Neumann(model.parameters(), lr=1e-2, warmup=2, period=4),
}
CLOSURE: dict[str, Build] = {
    "newton-cg": lambda model: tc.NewtonCG(model, lr=0.1, cg_max_iter=5),
    "sgn": lambda model: tc.SGN(model, cg_max_iter=5),
}


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 5),
    ).to(device)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, 3, 8, 8, generator=generator), torch.randint(5, (32,), generator=generator))
        for _ in range(STEPS)
    ]


def train(name: str, device: torch.device) -> list[Tensor]:
    """The parameters after a few steps, on the CPU."""
    model = network(device)
    optimizer = {**GRADIENT, **CLOSURE}[name](model)
    for x, y in batches():
        x, y = x.to(device), y.to(device)

        def loss_and_output(x: Tensor = x, y: Tensor = y) -> Any:
            output = model(x)
            loss = functional.cross_entropy(output, y)
            return (loss, output) if name == "sgn" else loss

        if name in CLOSURE:
            optimizer.step(loss_and_output)
        else:
            loss_and_output().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize("name", [*GRADIENT, *CLOSURE])
def test_steps_equal_those_of_the_cpu(name: str, device: torch.device) -> None:
    for ours, reference in zip(train(name, device), train(name, torch.device("cpu")), strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", [*GRADIENT, *CLOSURE])
def test_a_run_repeats_bit_for_bit(name: str, device: torch.device) -> None:
    for first, second in zip(train(name, device), train(name, device), strict=True):
        assert torch.equal(first, second)


def test_kfac_groups_its_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of a backward pass, inverses applied and the update of all layers: one pair, three and one launch."""
    model = network(device)
    optimizer = tc.KFAC(model, lr=1e-2, damping=1e-2, update_size="kl_clip", factor_interval=1)
    names: list[str] = []
    run = JITFunction.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counting)
    for x, y in batches()[:3]:
        names.clear()
        functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert names.count("multiply_group_kernel") == 1
    assert "_accumulate_kernel" not in names
    assert [names.count(f"{name}_kernel") for name in ("first", "second", "momentum_update")] == [1, 1, 1]


def test_the_common_kfac_step_does_not_synchronise(device: torch.device) -> None:
    model = network(device)
    optimizer = tc.KFAC(model, factor_interval=100, inverse_interval=100)
    data = [(x.to(device), y.to(device)) for x, y in batches()]
    for count, (x, y) in enumerate(data):
        functional.cross_entropy(model(x), y).backward()
        torch.cuda.set_sync_debug_mode("error" if count > 2 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
