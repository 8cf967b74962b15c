"""Steps in CUDA graphs: replays are eager steps bit for bit, follow the learning rate, and miss no gradient."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import triton_curv as tc


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 10)).to(device)


def batch(device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 12, generator=generator), torch.randint(10, (64,), generator=generator)
    return x.to(device), y.to(device)


def kfac(model: nn.Module, device: torch.device) -> tc.KFAC:
    """The rate where the graph reads it; momentum is a float, the bias of its average is taken out on the device."""
    lr = torch.tensor(1e-2, device=device)
    return tc.KFAC(model, lr=lr, factor_interval=10**6, inverse_interval=10**6)


def passes(model: nn.Module, x: Tensor, y: Tensor) -> None:
    functional.cross_entropy(model(x), y).backward()


def captured(model: nn.Module, optimizer: tc.KFAC, x: Tensor, y: Tensor, whole: bool) -> torch.cuda.CUDAGraph:
    """A graph of one common step, or of forward, backward and step, with gradients that stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            passes(model, x, y)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if whole:
            for p in model.parameters():
                assert p.grad is not None
                p.grad.zero_()
            passes(model, x, y)
        optimizer.step()
    return graph


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("whole", [False, True], ids=["step", "forward, backward, step"])
def test_replays_are_eager_steps_bit_for_bit_and_follow_the_rate(whole: bool, device: torch.device) -> None:
    results = []
    for replays in (False, True):
        model = network(device)
        optimizer = kfac(model, device)
        x, y = batch(device, 0)
        if replays:
            graph = captured(model, optimizer, x, y, whole)
        else:
            for _ in range(3):
                optimizer.zero_grad(set_to_none=False)
                passes(model, x, y)
                optimizer.step()
        steps = []
        for i in range(4):
            for place, value in zip((x, y), batch(device, i), strict=True):
                place.copy_(value)
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + i))
            if not (whole and replays):
                optimizer.zero_grad(set_to_none=False)
                passes(model, x, y)
            graph.replay() if replays else optimizer.step()
            steps.append(snapshot(model))
        results.append(steps)
    for eager, replayed in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))


def test_a_rate_of_zero_between_replays_stops_the_weights(device: torch.device) -> None:
    model = network(device)
    optimizer = kfac(model, device)
    x, y = batch(device, 0)
    graph = captured(model, optimizer, x, y, whole=True)
    before = snapshot(model)
    graph.replay()
    assert any(not torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    optimizer.param_groups[0]["lr"].zero_()
    before = snapshot(model)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))


def test_a_parameter_without_a_gradient_is_named_when_a_graph_is_captured(device: torch.device) -> None:
    model = network(device)
    optimizer = kfac(model, device)
    x, y = batch(device, 0)
    for _ in range(3):
        optimizer.zero_grad()
        passes(model, x, y)
        optimizer.step()
    for p in list(model.parameters())[2:]:
        p.grad = None
    with pytest.raises(tc.ConfigurationError, match="gradient"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def steps_without_a_wait(model: torch.nn.Module, optimizer: tc.KFAC, device: torch.device) -> None:
    x, y = batch(device, 0)
    for i in range(4):
        optimizer.zero_grad()
        passes(model, x, y)
        torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_common_step_waits_for_nothing(device: torch.device) -> None:
    model = network(device)
    steps_without_a_wait(model, kfac(model, device), device)


@pytest.mark.parametrize("rescale", ["paper", "code"])
def test_weights_are_rescaled_without_a_wait(rescale: Literal["paper", "code"], device: torch.device) -> None:
    model = network(device)
    optimizer = tc.KFAC(model, lr=1e-2, factor_interval=10**6, inverse_interval=10**6, rescale=rescale)
    steps_without_a_wait(model, optimizer, device)
