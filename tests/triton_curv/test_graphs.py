"""Compiled functions called at little cost: strict when they are traced, right and freed afterwards; hooks of steps."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import triton_curv as tc
from triton_curv.graphs import Graphs
from triton_curv.training.step_bench import apart


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def move_(params: list[Tensor], grads: list[Tensor | None], weight: int) -> Tensor:
    """w -= weight * grad; returns the sum of all w."""
    for p, grad in zip(params, grads, strict=True):
        if grad is not None:
            p.sub_(weight * grad)
    total: Tensor = torch.stack([p.sum() for p in params]).sum()
    return total


def broken(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x + 1


def test_another_memory_format_is_another_graph_and_not_a_wrong_one() -> None:
    """By inductor, which would read a gradient in another order as it reads the first one."""
    graphs = Graphs(move_, {})
    for step in range(4):
        weights, gradient = torch.zeros(2, 3, 2, 2), torch.arange(24.0).view(2, 3, 2, 2)
        grad = gradient.to(memory_format=torch.channels_last) if step % 2 else gradient
        assert graphs("all", [weights], [grad], 2) == -2 * gradient.sum()
        torch.testing.assert_close(weights, -2 * gradient)
    assert counters["stats"]["unique_graphs"] == 2


def test_numbers_and_sizes_that_differ_between_optimizers_stay_constants() -> None:
    """torch would make a symbol of what it has seen with two values."""
    symbols: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sizes = [size for x in inputs for size in (x.shape if isinstance(x, Tensor) else [x])]
        symbols.append(any(isinstance(size, torch.SymInt) for size in sizes))
        return graph.forward

    for size in (3, 4, 5):
        graphs = Graphs(move_, {"backend": backend})
        for _ in range(2):
            graphs("all", [torch.zeros(size)], [torch.ones(size)], size)
    assert symbols == [False] * 3


def test_a_graph_break_is_an_error_unless_it_is_allowed() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        Graphs(broken, {"backend": "eager"})("all", torch.zeros(1))
    assert Graphs(broken, {"backend": "eager", "fullgraph": False})("all", torch.zeros(1)) == 1


@pytest.mark.parametrize("name", ["neumann", "kfac"])
def test_state_goes_with_its_optimizer(name: str) -> None:
    """Graphs hold the tensors that they are made for."""
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](model, {"backend": "aot_eager"})
    step(model, optimizer, 3)
    found: Any = optimizer
    state = weakref.ref(found._matrices[0].rows[0].momentum if name == "kfac" else found._groups[0].exp_avgs[0])
    assert counters["stats"]["unique_graphs"]
    del found, optimizer, model  # K-FAC lives as long as the model that has its taps
    gc.collect()  # the optimizer,
    gc.collect()  # and the graphs that went with it
    assert state() is None


OPTIMIZERS: dict[str, Callable[[nn.Module, Any], Optimizer]] = {
    "neumann": lambda model, compiling: tc.Neumann(model.parameters(), compile=compiling),
    "kfac": lambda model, compiling: tc.KFAC(model, compile=compiling),
}


def step(model: nn.Linear, optimizer: Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("compiling", [False, {"backend": "eager"}], ids=["eager", "compiled"])
def test_hooks_run_once_and_the_profiler_sees_steps(name: str, compiling: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](model, compiling)
    step(model, optimizer, 2)  # nobody looks
    seen: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda of, args, kwargs: seen.append("before")),
        optimizer.register_step_post_hook(lambda of, args, kwargs: seen.append("after")),
        register_optimizer_step_pre_hook(lambda of, args, kwargs: seen.append("global")),
    ]
    step(model, optimizer)
    assert seen == ["global", "before", "after"]
    for handle in handles:
        handle.remove()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, optimizer)
    assert len(seen) == 3
    ranges = [event for event in profile.events() if event.name == f"Optimizer.step#{type(optimizer).__name__}.step"]
    assert len(ranges) == 1


@pytest.mark.parametrize("isolated", [True, False])
def test_models_of_a_class_have_graphs_apart(isolated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    if not isolated:
        whole = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, *, backend: whole(function, backend=backend))
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    compiled = [apart(model, backend=backend) for model in models]
    x = torch.randn(4, 3)
    for call, model in [*zip(compiled, models, strict=True)] * 2:
        torch.testing.assert_close(call(x), model(x))
    assert graphs == 2
