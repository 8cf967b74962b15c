"""KFAC under torch.compile: one graph a region, no recompiles whatever the schedules do, and the results of eager."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

import triton_curv as tc
from triton_curv.sharding.choice import exchange_for
from triton_curv.sharding.ranks import Found

STEPS = 50
INTERVALS: dict[str, Any] = {"factor_interval": 3, "inverse_interval": 4}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A convolution, a norm layer, linear layers, and a parameter that only the fallback trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5)
        )
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x) * self.scale
        return logits


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(count)
    ]


def change_hyper_parameters(optimizer: tc.KFAC, i: int) -> None:
    """What schedules do: new floats at every step."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * (1 + math.cos(i / 10))
        group["momentum"] = 0.9 - 0.004 * i
        group["damping"] = 1e-3 / (1 + i)
        group["weight_decay"] = 1e-4 * i


def train(
    model: nn.Module, optimizer: tc.KFAC, step: Callable[[], Any], steps: int = STEPS, warm_up: int = 13
) -> list[Tensor]:
    """Weights after some steps; those after the warm-up must not compile anything."""
    for i, (x, y) in enumerate(batches(steps)):
        change_hyper_parameters(optimizer, i)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        with torch._dynamo.config.patch(error_on_recompile=i >= warm_up):
            step()
    return [p.detach().clone() for p in model.parameters()]


def assert_near(actual: list[Tensor], expected: list[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def eager(steps: int = STEPS, **options: Any) -> list[Tensor]:
    model = net()
    optimizer = tc.KFAC(model, **options)
    return train(model, optimizer, optimizer.step, steps)


@pytest.mark.parametrize("whole", [False, True], ids=["regions", "step"])
def test_fifty_steps_of_schedules_make_one_graph_a_region(whole: bool) -> None:
    """Three regions; of a whole step a graph for each set of regions in it: none, fold, refresh, both."""
    expected = eager(**INTERVALS)
    model = net()
    optimizer = tc.KFAC(model, **INTERVALS, compile=False if whole else {"backend": "aot_eager"})
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if whole else optimizer.step
    assert_near(train(model, optimizer, step), expected)
    assert counters["stats"]["unique_graphs"] == (4 if whole else 3)
    assert not counters["graph_break"]
    assert optimizer.param_groups[0]["step"] == STEPS
    assert optimizer.health()["optimizer"]["skipped_steps"] == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "kl-clip, tensors": {"update_size": "kl_clip", "damping": torch.tensor(0.1), "lr": torch.tensor(0.01)},
    "paper": {"update_size": "none", "damping": 0.1, "rescale": "code", "reduction": "sum", "fallback": "sgd"},
    "ekfac": {"inverse": "eigen", "ekfac": True},
    "neumann, parts": {"inverse": "neumann", "refresh_budget": 4},
    "blocks": {"max_factor_dim": 4, "norm_fisher": "full", "maximize": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_traces_to_what_it_is_eagerly(name: str) -> None:
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 4), nn.PReLU())
        optimizer = tc.KFAC(model, **OPTIONS[name], factor_interval=2, inverse_interval=2)
        step = torch.compile(optimizer.step, fullgraph=True, backend="eager") if compiled else optimizer.step
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(7, 6, generator=generator)).square().mean().backward()
            step()
        weights.append([p.detach() for p in model.parameters()])
    assert_near(weights[1], weights[0])
    assert not counters["graph_break"]


@pytest.mark.parametrize("order", ["compile first", "scheduler first", "regions"])
def test_schedulers_before_and_after_compiling(order: str) -> None:
    model = nn.Linear(3, 2)
    regions: Any = {"backend": "eager"} if order == "regions" else False
    optimizer = tc.KFAC(model, lr=0.1, factor_interval=20, inverse_interval=20, compile=regions)
    step: Any = optimizer.step
    if order == "compile first":
        step = torch.compile(step, fullgraph=True, backend="eager")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    if order == "scheduler first":
        step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    for i in range(3):
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**i
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        step()
        schedule.step()
        assert not torch.equal(before, model.weight)
    assert counters["stats"]["unique_graphs"] == (3 if order == "regions" else 2)


def test_a_whole_training_step_is_one_graph() -> None:
    """Forward, loss, backward and step: a graph for steps with statistics and inverses, and one for those without."""
    results = []
    for compiled in (False, True):
        model = net()
        optimizer = tc.KFAC(model, factor_interval=3, inverse_interval=3)

        def step(x: Tensor, y: Tensor, model: nn.Module = model, optimizer: tc.KFAC = optimizer) -> Tensor:
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            for p in model.parameters():
                p.grad = None
            return loss.detach()

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        losses = []
        for i, (x, y) in enumerate(batches(8)):
            change_hyper_parameters(optimizer, i)
            with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=i >= 2):
                losses.append(run(x, y))
        results.append([*losses, *(p.detach() for p in model.parameters())])
    assert_near(results[1], results[0])
    assert counters["stats"]["unique_graphs"] == 2


def test_inductor_gives_what_eager_gives() -> None:
    expected = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        optimizer = tc.KFAC(model, lr=1e-2, **INTERVALS, compile=compiled)
        generator = torch.Generator().manual_seed(2)
        for i in range(14):
            change_hyper_parameters(optimizer, i)
            optimizer.zero_grad()
            x = torch.randn(5, 4, generator=generator)
            model(x).square().mean().backward()
            with torch._dynamo.config.patch(error_on_recompile=i >= 4):
                optimizer.step()
        expected.append([p.detach().clone() for p in model.parameters()])
    assert_near(expected[1], expected[0], rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 3


def test_a_bad_gradient_is_skipped_in_a_graph_too() -> None:
    model = net()
    optimizer = tc.KFAC(model)
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    for i, (x, y) in enumerate(batches(3)):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        if i == 1:
            model.scale.grad = torch.full_like(model.scale, torch.nan)
        before = [p.detach().clone() for p in model.parameters()]
        step()
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert not any(moved) if i == 1 else all(moved)
    assert optimizer.health()["optimizer"]["skipped_steps"] == 1


def test_taps_that_saw_nothing_raise_from_a_graph() -> None:
    model = net()
    optimizer = tc.KFAC(model)
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    optimizer.capture(False)
    model(batches(1)[0][0]).sum().backward()
    # torch leaves gradients switched off where a graph of its "eager" backend raises
    with torch.enable_grad(), pytest.raises(tc.NoStatisticsError, match="tapped backward"):
        step()


def test_what_must_look_at_values_says_so_when_it_is_compiled() -> None:
    model = net()
    optimizer = tc.KFAC(model, factor_interval=tc.AdaptiveInterval())
    model(batches(1)[0][0]).sum().backward()
    with pytest.raises(Exception, match="compile=True"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()


def test_several_ranks_step_eagerly_and_say_so() -> None:
    found = Found(net(), "none", (0, 1), 1)
    options = tc.KFAC(net()).options
    with pytest.raises(tc.ConfigurationError, match="eager step on several ranks"):
        exchange_for({}, found, tc.Sharding(), options, torch.float64, compiled=True)
