"""Factor products of several layers in one call: the same sums as one by one, and nothing that waits too long."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_curv as tc
from triton_curv.blocks import products
from triton_curv.errors import ChangedInputError
from triton_curv_kernels import accumulate_factors_


class Twice(nn.Module):
    """Linear, grouped convolution, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.first = nn.Linear(6, 5)
        self.again = nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x).mean(-1))
        out: Tensor = self.again(torch.tanh(self.again(torch.tanh(self.first(h)))))
        return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Group as on a GPU; how many factors each call took."""
    counts: list[int] = []

    def counting(factors: list[Tensor], *args: Any, **kwargs: Any) -> None:
        counts.append(len(factors))
        accumulate_factors_(factors, *args, **kwargs)

    monkeypatch.setattr(products, "use_reference", lambda _: False)
    monkeypatch.setattr(products, "accumulate_factors_", counting)
    return counts


def built(**options: Any) -> tuple[nn.Module, tc.KFAC]:
    torch.manual_seed(0)
    model = Twice()
    return model, tc.KFAC(model, lr=0.1, factor_interval=1, **options)


def factors(model: nn.Module, optimizer: tc.KFAC, batches: int = 1) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches):
        model(torch.randn(8, 4, 7, generator=generator)).square().mean().backward()
    return {name: block.factors() for name, block in optimizer.blocks.items()}


def assert_equal(ours: dict[str, dict[str, Tensor]], reference: dict[str, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("batches", [1, 2])
def test_sums_are_those_of_single_products(batches: int, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of a layer called twice take two calls: A and G of `again`, then all others, in each backward pass."""
    ours = factors(*built(), batches)
    assert calls == [2, 5] * batches
    monkeypatch.setattr(products, "LIMIT", 0)
    single = factors(*built(), batches)
    assert len(calls) == 2 * batches
    assert_equal(ours, single)


def test_sums_of_steps_that_follow_one_another(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def weights() -> list[Tensor]:
        model, optimizer = built()
        for seed in range(3):
            torch.manual_seed(seed)
            model(torch.randn(8, 4, 7)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    ours = weights()
    assert len(calls) == 6
    monkeypatch.setattr(products, "LIMIT", 0)
    torch.testing.assert_close(ours, weights(), rtol=1e-5, atol=1e-6)


def test_rows_wait_until_they_hold_the_limit(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = factors(*built())
    calls.clear()
    monkeypatch.setattr(products, "LIMIT", 1)
    assert_equal(factors(*built()), whole)
    assert calls == [1] * 7


def test_a_caller_may_write_to_its_input_between_backward_passes(calls: list[int]) -> None:
    model, optimizer = built()
    x = torch.randn(8, 4, 7)
    first = x.clone()
    model(x).square().mean().backward()
    assert calls
    x.copy_(torch.randn(8, 4, 7))
    other, reference = built()
    other(first).square().mean().backward()
    assert_equal(
        {n: b.factors() for n, b in optimizer.blocks.items()}, {n: b.factors() for n, b in reference.blocks.items()}
    )


def test_an_input_changed_within_a_backward_pass_is_an_error(calls: list[int]) -> None:
    model, _ = built()
    h = torch.randn(8, 5, requires_grad=True)

    def spoil(grad: Tensor) -> None:
        with torch.no_grad():
            h.mul_(2.0)

    h.register_hook(spoil)
    assert isinstance(model, Twice)
    with pytest.raises(ChangedInputError, match=r"products.LIMIT = 0"):
        model.again(h).sum().backward()


def test_a_failed_backward_pass_leaves_nothing_behind(calls: list[int]) -> None:
    model, optimizer = built()
    assert isinstance(model, Twice)

    def fail(grad: Tensor) -> None:
        raise ValueError("planted")

    x = torch.randn(8, 5, requires_grad=True)
    x.register_hook(fail)
    with pytest.raises(ValueError, match="planted"):
        model.again(x).sum().backward()
    assert calls == []
    optimizer._store.forget()
    model(torch.randn(8, 4, 7)).square().mean().backward()
    assert calls == [2, 5]


def test_products_run_on_the_stream_that_made_their_rows(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a backward pass comes on the caller's stream, which then waits; another stream's rows come apart."""
    happened: list[object] = []

    class Stream:
        device = "cuda"

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            happened.append(f"{self.name} waits for {other.name}")

    def run(*_: object) -> None:
        happened.append(f"products on {streams[-1].name}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    streams = [Stream("main")]
    monkeypatch.setattr(products, "accumulate_factors_", run)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    queue = products.ProductQueue()
    side = Stream("side")
    queue._stream = side  # type: ignore[assignment]  # a fake
    factor, rows = torch.zeros(2, 2), torch.ones(3, 2)
    queue._waiting.append(products.Product(factor, rows, 1.0, False, rows._version))
    queue.flush()
    assert happened == ["products on side", "main waits for side"]
    with on(side):
        queue._waiting.append(products.Product(factor, rows, 1.0, False, rows._version))
        queue.flush()
    assert happened[2:] == ["products on side"]


def test_outside_of_a_backward_pass_nothing_waits(calls: list[int]) -> None:
    _, optimizer = built()
    optimizer.blocks["again"].accumulate_(torch.ones(3, 5), torch.ones(3, 5), training=True, use=0)
    assert calls == [1, 1]


@pytest.mark.interpreter
def test_kernels_group_the_products_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = factors(*built())
    monkeypatch.setenv("TRITON_CURV_BACKEND", "triton")
    model, optimizer = built()
    generator = torch.Generator().manual_seed(1)
    model(torch.randn(8, 4, 7, generator=generator)).square().mean().backward()
    monkeypatch.setenv("TRITON_CURV_BACKEND", "reference")
    ours = {name: block.factors() for name, block in optimizer.blocks.items()}
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
