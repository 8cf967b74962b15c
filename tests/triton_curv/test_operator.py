"""Damped inverses applied to all blocks together: what each block gives by itself, in any mixture, and a whole step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_curv as tc
from triton_curv.blocks import operator as file
from triton_curv.blocks.low_rank import LowRank
from triton_curv.blocks.operator import Forms, Operator, solve, solve_all, solves_in_place
from triton_curv_kernels import apply_damped_inverse


def spd(batch: int, n: int) -> Tensor:
    half = torch.randn(batch, n, n)
    return half @ half.mT


def mixture() -> tuple[list[Operator], list[Tensor]]:
    """Whole, in groups, a single factor, diagonal blocks, an eigenbasis."""
    torch.manual_seed(0)
    operators = [
        Operator([spd(1, 5)], [spd(1, 7)], None, True),
        Operator([spd(2, 3)], [spd(2, 4)], None, True),
        Operator([spd(6, 2)], [], None, True),
        Operator([spd(1, 3)], [spd(2, 3)], None, False),
        Operator([spd(1, 4)], [spd(1, 3)], torch.rand(1, 4, 3), True),
    ]
    return operators, [torch.randn(s) for s in ((1, 5, 7), (2, 3, 4), (6, 2, 1), (1, 3, 6), (1, 4, 3))]


def low_rank(n: int, rank: int) -> LowRank:
    basis = torch.linalg.qr(torch.randn(n, rank)).Q.mT
    return LowRank(basis.contiguous(), torch.rand(rank), 1.7)


@pytest.mark.parametrize("left", ["diagonal", "low rank", "whole", "blocks"])
def test_low_rank_forms_are_the_dense_matrices(left: str) -> None:
    """Also in the memory of the gradient itself, where G allows it."""
    torch.manual_seed(0)
    of_A, of_G = low_rank(30, 4), low_rank(20, 3)
    factors = {"diagonal": torch.rand(20, 1, 1), "whole": spd(1, 20), "blocks": spd(4, 5)}.get(left, torch.empty(0))
    dense = {"diagonal": factors.flatten().diag(), "whole": factors[:1], "blocks": torch.block_diag(*factors)}
    forms = Forms(of_G if left == "low rank" else None, of_A)
    operator = Operator([factors], [torch.empty(0)], None, left in ("whole", "low rank"), forms)
    matrix = torch.randn(1, 20, 30)
    expected = dense.get(left, of_G.dense()) @ matrix @ of_A.dense()
    out = torch.full_like(matrix, torch.nan)
    solve(operator, matrix, out)
    torch.testing.assert_close(out, expected)
    assert solves_in_place(operator) == (left in ("diagonal", "low rank"))
    if solves_in_place(operator):
        solve(operator, matrix, matrix)
        torch.testing.assert_close(matrix, expected)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on apply together as on a GPU; how many blocks each call takes."""
    counts: list[int] = []
    apply: Callable[..., Any] = apply_damped_inverse

    def counting(updates: list[Tensor], *args: Any) -> Any:
        counts.append(len(updates))
        return apply(updates, *args)

    monkeypatch.setattr(file, "use_reference", lambda _: False)
    monkeypatch.setattr(file, "apply_damped_inverse", counting)
    return counts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_calls(monkeypatch)


@pytest.mark.parametrize("chosen", [range(5), range(3), (3, 4), ()], ids=str)
def test_all_equal_each(chosen: Any, calls: list[int]) -> None:
    operators, matrices = ([column[i] for i in chosen] for column in mixture())
    expected, outs = ([torch.full_like(m, torch.nan) for m in matrices] for _ in "ab")
    for operator, matrix, out in zip(operators, matrices, expected, strict=True):
        solve(operator, matrix, out)
    sums = solve_all(operators, matrices, outs)
    torch.testing.assert_close(outs, expected)
    together = [i for i in chosen if i < 3]
    assert calls == ([len(together)] if together else [])
    assert (sums is not None) == (bool(together) and len(together) == len(operators))
    if sums is not None:
        pairs = list(zip(outs, matrices, strict=True))
        torch.testing.assert_close(sums.products, torch.stack([(p * d).sum() for p, d in pairs]))
        torch.testing.assert_close(sums.squares, torch.stack([p.square().sum() for p, _ in pairs]))


def test_on_cpu_the_reference_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "apply_damped_inverse", None)
    operators, matrices = mixture()
    outs = [torch.empty_like(m) for m in matrices]
    assert solve_all(operators, matrices, outs) is None


def trained(**options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    optimizer = tc.KFAC(model, lr=0.1, factor_interval=1, inverse_interval=2, weight_decay=1e-2, **options)
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 2, 4, 4)), torch.randint(3, (8,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("update_size", ["rms", "kl_clip", "none"])
def test_steps_equal_those_of_single_blocks(update_size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"update_size": update_size, "damping": 1e-2, "kl_clip": 1e-3}
    expected = trained(**options)
    counts = count_calls(monkeypatch)
    torch.testing.assert_close(trained(**options), expected, rtol=1e-4, atol=1e-6)
    assert counts == [3] * 4


@pytest.mark.interpreter
def test_a_step_in_kernels_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, inverses, application and update all by kernels, from the public API."""
    expected = trained(update_size="kl_clip", damping=1e-2, kl_clip=1e-3)
    monkeypatch.setenv("TRITON_CURV_BACKEND", "triton")
    ours = trained(update_size="kl_clip", damping=1e-2, kl_clip=1e-3)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
