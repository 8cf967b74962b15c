"""Taps and compiled steps in a training loop: mode="reduce-overhead", a smaller last batch, stances."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

import triton_curv as tc

SIZES = (16, 16, 16, 5)  # of an epoch
EPOCHS = 3


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4))  # little to compile


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = SIZES * EPOCHS
    return [(torch.randn(n, 6, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


def trained(compiled: bool) -> tuple[list[Tensor], int]:
    """Weights, and graphs of the model; statistics at every third step, so with each size of batch, on and off.

    After two epochs nothing may be compiled anew, and one step is taken without graphs.
    """
    model = network()
    optimizer = tc.KFAC(
        model, factor_interval=3, inverse_interval=3, compile={"backend": "aot_eager"} if compiled else False
    )
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
    graphs = 0
    for i, (x, y) in enumerate(batches()):
        known = i >= 2 * len(SIZES)
        stance = "default" if not (compiled and known) else "force_eager" if i == 9 else "fail_on_recompile"
        before = counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance(stance):
            optimizer.zero_grad()
            loss = functional.cross_entropy(forward(x), y)
            graphs += counters["stats"]["unique_graphs"] - before
            loss.backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()], graphs


def test_reduce_overhead_a_smaller_last_batch_and_stances() -> None:
    """A graph with taps and one without, and one more of each for other sizes."""
    (expected, _), (weights, graphs) = trained(False), trained(True)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert graphs == 4
    assert not counters["graph_break"]
