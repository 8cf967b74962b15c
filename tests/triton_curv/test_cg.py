"""Conjugate gradients against dense solves in float64; ends, rules, device-side masks."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from tests.support.products import join, split_like
from triton_curv.errors import ConfigurationError
from triton_curv.operators import CGResult, StoppingRule, cg
from triton_curv.operators.cg import ENDS
from triton_curv.operators.vectors import Vectors

EXACT = StoppingRule(tol=1e-12)
SHAPES = [(3, 2), (), (0,), (5,)]  # 12 numbers


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    A: Tensor = basis * eigenvalues @ basis.T
    return A


def random_vector(seed: int = 1) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def product_with(A: Tensor) -> Callable[[Vectors], Vectors]:
    return lambda vectors: split_like(A @ join(vectors), vectors)


POSITIVE = symmetric(torch.linspace(1, 10, 12, dtype=torch.float64))


def assert_solves(result: CGResult, A: Tensor, b: Vectors, atol: float = 1e-11) -> None:
    torch.testing.assert_close(join(result.solution), torch.linalg.solve(A, join(b)), rtol=0, atol=atol)
    torch.testing.assert_close(join(result.residual), join(b) - A @ join(result.solution), rtol=0, atol=atol)


def test_solves_in_at_most_n_steps() -> None:
    b = random_vector()
    result = cg(product_with(POSITIVE), b, EXACT, 50)
    assert_solves(result, POSITIVE, b)
    assert result.iterations <= 12
    assert result.reason == "converged"
    assert result.history is None


def test_as_many_steps_as_distinct_eigenvalues() -> None:
    A = symmetric(torch.tensor([2.0] * 6 + [5.0] * 4 + [7.0] * 2, dtype=torch.float64))
    result = cg(product_with(A), random_vector(), StoppingRule(tol=1e-9), 50)
    assert result.iterations == 3


def test_every_iterate_is_the_best_of_its_krylov_space() -> None:
    """x_k minimises the A-norm error over span{b, Ab, ..., A^(k-1) b}: an oracle that knows no recurrence."""
    b = random_vector()
    flat = join(b)
    krylov = [flat]
    for k in range(1, 5):
        K = torch.linalg.qr(torch.stack(krylov, 1)).Q
        best = K @ torch.linalg.solve(K.T @ POSITIVE @ K, K.T @ flat)
        result = cg(product_with(POSITIVE), b, StoppingRule(), k)
        torch.testing.assert_close(join(result.solution), best, rtol=0, atol=1e-12)
        assert result.reason == "iteration limit"
        assert result.iterations == k
        krylov.append(POSITIVE @ krylov[-1])


@pytest.mark.parametrize("kind", ["diagonal", "inverse"])
def test_preconditioned(kind: str) -> None:
    scales = torch.logspace(0, 4, 12, dtype=torch.float64)
    A = scales.sqrt().diag() @ POSITIVE @ scales.sqrt().diag()
    M = (1 / A.diagonal()).diag() if kind == "diagonal" else torch.linalg.inv(A)
    b = random_vector()
    rule = StoppingRule(rtol=1e-9)
    plain = cg(product_with(A), b, rule, 1000)
    result = cg(product_with(A), b, rule, 1000, preconditioner=product_with(M))
    torch.testing.assert_close(join(result.solution), torch.linalg.solve(A, join(b)), rtol=1e-6, atol=1e-8)
    assert result.iterations <= (12 if kind == "diagonal" else 1)
    assert plain.iterations > result.iterations


def test_warm_start() -> None:
    b = random_vector()
    exact = split_like(torch.linalg.solve(POSITIVE, join(b)), b)
    start = [t + 1e-3 for t in exact]
    kept = [t.clone() for t in start]
    result = cg(product_with(POSITIVE), b, StoppingRule(tol=1e-6), 50, start=start)
    assert_solves(result, POSITIVE, b, atol=1e-6)
    assert result.iterations < cg(product_with(POSITIVE), b, StoppingRule(tol=1e-6), 50).iterations
    torch.testing.assert_close(start, kept, rtol=0, atol=0)
    assert cg(product_with(POSITIVE), b, StoppingRule(tol=1e-6), 50, start=exact).iterations == 0


@pytest.mark.parametrize(("A", "b"), [(3.0, 6.0), (3.0, 0.0), (1e-12, 1.0)])
def test_one_by_one(A: float, b: float) -> None:
    result = cg(lambda v: [A * v[0]], [torch.tensor(b, dtype=torch.float64)], StoppingRule(tol=1e-14), 5)
    assert result.solution[0].item() == pytest.approx(b / A, rel=1e-14)
    assert result.iterations == (0 if b == 0 else 1)
    assert result.reason == "converged"


def test_singular_but_consistent() -> None:
    A = symmetric(torch.tensor([0.0] * 5 + [1, 2, 3, 4, 5, 6, 7], dtype=torch.float64))
    b = split_like(A @ join(random_vector()), random_vector())
    result = cg(product_with(A), b, StoppingRule(tol=1e-10), 50)
    torch.testing.assert_close(join(result.solution), torch.linalg.pinv(A, hermitian=True) @ join(b), rtol=0, atol=1e-9)
    assert result.reason == "converged"
    # asked for more than there is, it stops at rounding instead of dividing by it
    endless = cg(product_with(A), b, StoppingRule(), 500)
    torch.testing.assert_close(join(endless.solution), join(result.solution), rtol=0, atol=1e-8)


def test_zero_matrix() -> None:
    b = random_vector()
    result = cg(lambda v: [torch.zeros_like(t) for t in v], b, EXACT, 5)
    assert not join(result.solution).any()
    assert result.reason == "negative curvature"


def test_negative_curvature_returns_the_iterate_before() -> None:
    A = torch.tensor([4.0, 3, 2, -1], dtype=torch.float64).diag()
    b = [torch.tensor([1.0, 1, 1, 0.1], dtype=torch.float64)]
    result = cg(product_with(A), b, EXACT, 50)
    assert result.reason == "negative curvature"
    assert 0 < result.iterations < 4
    before = cg(product_with(A), b, EXACT, int(result.iterations))
    torch.testing.assert_close(result.solution, before.solution, rtol=0, atol=0)
    torch.testing.assert_close(join(result.residual), join(b) - A @ join(result.solution), rtol=0, atol=1e-12)
    assert join(result.solution) @ join(b) > 0  # a descent direction of the quadratic
    ignored = cg(product_with(A), b, EXACT, 50, negative_curvature="ignore")
    torch.testing.assert_close(join(ignored.solution), torch.linalg.solve(A, b[0]), rtol=0, atol=1e-10)


def test_negative_curvature_at_once_returns_the_start() -> None:
    b = random_vector()
    result = cg(lambda v: [-t for t in v], b, EXACT, 50)
    assert (result.reason, int(result.iterations)) == ("negative curvature", 0)
    assert not join(result.solution).any()
    start = [0.5 * t for t in b]
    assert torch.equal(join(cg(lambda v: [-t for t in v], b, EXACT, 50, start=start).solution), join(start))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_breakdown_returns_the_iterate_before(bad: float) -> None:
    calls = 0

    def product(vectors: Vectors) -> Vectors:
        nonlocal calls
        calls += 1
        return split_like(POSITIVE @ join(vectors) * (bad if calls == 4 else 1.0), vectors)

    b = random_vector()
    result = cg(product, b, EXACT, 50)
    assert (result.reason, int(result.iterations)) == ("breakdown", 3)
    torch.testing.assert_close(result.solution, cg(product_with(POSITIVE), b, EXACT, 3).solution, rtol=0, atol=0)


def test_a_preconditioner_that_is_not_positive_is_a_breakdown() -> None:
    result = cg(product_with(POSITIVE), random_vector(), EXACT, 50, preconditioner=lambda v: [-t for t in v])
    assert (result.reason, int(result.iterations)) == ("breakdown", 0)


# stopping rules


@pytest.mark.parametrize("name", ["reiz", "gargiani", "relative"])
def test_rules_stop_at_the_first_residual_that_is_small_enough(name: str) -> None:
    b = [100 * t for t in random_vector()]
    result = cg(product_with(POSITIVE), b, StoppingRule.named(name, 1e-3), 50, keep_history=True)
    history = result.history
    assert history is not None
    done = int(result.iterations)
    assert history[done + 1 :].isnan().all()
    for k in range(done + 1):
        r = join(b) - POSITIVE @ join(cg(product_with(POSITIVE), b, StoppingRule(), k).solution)
        norm = r.abs().max() if name == "gargiani" else r.norm()
        assert history[k].item() == pytest.approx(norm.item(), rel=1e-6, abs=1e-12)
        bound = 1e-3 * (join(b).norm() if name == "relative" else 1.0)
        assert (norm <= bound) == (k == done)


def test_gargiani_makes_one_iteration_at_least() -> None:
    b = [1e-9 * t for t in random_vector()]
    assert cg(product_with(POSITIVE), b, StoppingRule.named("gargiani", 1e-6), 50).iterations == 1
    assert cg(product_with(POSITIVE), b, StoppingRule.named("reiz", 1e-6), 50).iterations == 0
    zero = [torch.zeros_like(t) for t in b]
    assert cg(product_with(POSITIVE), zero, StoppingRule.named("gargiani", 1e-6), 50).iterations == 0


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="reiz"):
        StoppingRule.named("martens", 1e-3)


# the device's path: no early exit


@pytest.mark.parametrize("eigenvalues", [[1.0, 2, 3, 4], [4.0, 3, 2, -1], [0.0, 0, 1, 2]])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_without_early_exit_nothing_changes(
    eigenvalues: list[float], preconditioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = symmetric(torch.tensor(eigenvalues, dtype=torch.float64))
    b = [torch.ones(4, dtype=torch.float64)]
    M = (lambda v: [0.5 * t for t in v]) if preconditioned else None
    early = cg(product_with(A), b, StoppingRule(tol=1e-9), 30, preconditioner=M, keep_history=True)
    calls = 0

    def product(vectors: Vectors) -> Vectors:
        nonlocal calls
        calls += 1
        wrong = float("nan") if calls > int(early.iterations) + 1 else 1.0  # after the end, anything may come
        return split_like(A @ join(vectors) * wrong, vectors)

    module = import_module("triton_curv.operators.cg")  # whose name the function covers
    monkeypatch.setattr(module, "known_true", lambda flags: False)
    late = cg(product, b, StoppingRule(tol=1e-9), 30, preconditioner=M, keep_history=True)
    assert calls == 30
    for name in ("solution", "residual", "iterations", "end"):
        torch.testing.assert_close(getattr(late, name), getattr(early, name), rtol=0, atol=0)
    torch.testing.assert_close(late.history, early.history, equal_nan=True)


def test_no_value_is_read_on_the_host() -> None:
    """A solve traces into one graph, which a read of a tensor's value would break."""
    A = POSITIVE.float()

    def solve(b: list[Tensor]) -> list[Tensor]:
        result = cg(lambda v: [A @ v[0]], b, StoppingRule(tol=1e-5), 12)
        return [*result.solution, result.iterations]

    torch._dynamo.reset()
    b = [join(random_vector()).float()]
    solution, iterations = torch.compile(solve, backend="aot_eager", fullgraph=True)(b)
    torch.testing.assert_close(solution, torch.linalg.solve(A, b[0]), rtol=0, atol=1e-4)
    assert iterations == cg(lambda v: [A @ v[0]], b, StoppingRule(tol=1e-5), 12).iterations


def test_single_precision_ends_by_itself() -> None:
    A = symmetric(torch.logspace(-3, 3, 12, dtype=torch.float64)).float()
    b = [join(random_vector()).float()]
    result = cg(lambda v: [A @ v[0]], b, StoppingRule(rtol=1e-4), 500)
    assert result.reason in ENDS
    assert (A @ result.solution[0] - b[0]).norm() <= 1e-2 * b[0].norm()
