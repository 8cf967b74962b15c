"""Hyperpower inverses of all factors in one call, or in portions: calls, and results that do not depend on it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_curv as tc
from triton_curv import inverse as inverse_file
from triton_curv.blocks import inversion
from triton_curv_kernels import damped_inverse_


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """Shapes of the banks that each call took."""
    found: list[list[tuple[int, ...]]] = []

    def counting(inverses: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        found.append([tuple(x.shape) for x in inverses])
        return damped_inverse_(inverses, *args, **kwargs)

    monkeypatch.setattr(inverse_file, "damped_inverse_", counting)
    return found


def refreshed(**options: Any) -> tuple[tc.KFAC, dict[str, dict[str, Tensor]]]:
    """Linear layers of three sizes and a norm layer, whose 2 x 2 factors have a closed form; what the blocks give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    optimizer = tc.KFAC(model, lr=0.1, inverse="neumann", damping=1e-2, **options)
    model(torch.randn(16, 7)).square().mean().backward()
    optimizer.refresh()
    gradients = {n: {k: torch.randn_like(p) for k, p in b.rule.params.items()} for n, b in optimizer.blocks.items()}
    return optimizer, {n: b.precondition(gradients[n]) for n, b in optimizer.blocks.items()}


def test_one_call_takes_all_factors(calls: list[list[tuple[int, ...]]]) -> None:
    refreshed()
    assert len(calls) == 1
    assert sorted(shape[1] for shape in calls[0]) == [3, 5, 6, 8]


def test_portions_and_single_factors_give_the_same(
    calls: list[list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, whole = refreshed()
    optimizer._store.invert_(optimizer._store.keys)
    assert len(calls) == 2
    assert [shape[0] for shape in calls[1]] == [1] * len(calls[1])  # factor by factor, in one call all the same
    calls.clear()
    monkeypatch.setattr(inversion, "PORTION", 100)
    _, parts = refreshed()
    assert len(calls) > 1
    assert max(sum(b * n * n for b, n, _ in call) for call in calls if len(call) > 1) <= 100
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_factor_that_fails_leaves_the_others_of_its_call_alone(calls: list[list[tuple[int, ...]]]) -> None:
    optimizer, _ = refreshed()
    store = optimizer._store
    bank = next(bank for bank in store.banks if bank.size == 8)
    before = bank.inverses.clone()
    bank.averages.fill_(torch.nan)
    store.invert_()
    assert len(calls) == 2
    assert torch.equal(bank.inverses, before)
    assert store.rungs[bank.rows].tolist() == [1]
    rest = torch.ones(len(store.rungs), dtype=torch.bool)
    rest[bank.rows] = False
    assert not store.rungs[rest].any()
