"""NeumannInner: Algorithm 1 written out, and the rate at which its inner loop finds the damped Newton step."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from tests.support.products import Problem, join, make_problem, split_like
from triton_curv.errors import ConfigurationError
from triton_curv.operators import ClosureError, NonFiniteError
from triton_curv.optimizers.neumann_inner import NeumannInner
from triton_curv.optimizers.newton_cg import NewtonCG


def least_squares() -> Problem:
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    return Problem(model, torch.randn(30, 4).double(), torch.randn(30, 1).double(), F.mse_loss)


def gradient_at(problem: Problem, w: Tensor) -> Tensor:
    weights = problem.flat()
    with torch.no_grad():
        for p, part in zip(problem.params, split_like(w, problem.params), strict=True):
            p.copy_(part)
    g = join(torch.autograd.grad(problem.loss_closure(), problem.params))
    with torch.no_grad():
        for p, part in zip(problem.params, split_like(weights, problem.params), strict=True):
            p.copy_(part)
    return g


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_it_is_algorithm_1(damping: float) -> None:
    problem = make_problem("linear", "cross_entropy")
    w, eta_in, eta_out = problem.flat(), 0.2, 0.05
    m = -gradient_at(problem, w)
    for _ in range(4):
        m = m - gradient_at(problem, w + eta_in * m) - damping * eta_in * m
    loss = problem.loss_closure().item()
    opt = NeumannInner(problem.model, eta_in, lr=eta_out, inner_steps=4, damping=damping)
    assert opt.step(problem.loss_closure).item() == loss
    torch.testing.assert_close(problem.flat(), w + eta_out * m, rtol=0, atol=1e-13)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_inner_loop_converges_to_the_damped_newton_step_at_the_rate_of_i_minus_eta_h(damping: float) -> None:
    problem = least_squares()
    H, w = problem.hessian(), problem.flat()
    A = H + damping * torch.eye(len(w)).double()
    eta = 1.5 / float(torch.linalg.eigvalsh(A).max())
    newton = torch.linalg.solve(A, -gradient_at(problem, w))
    contraction = torch.eye(len(w)).double() - eta * A
    rho = float(torch.linalg.matrix_norm(contraction, 2))
    assert rho < 1
    errors = []
    for k in range(0, 40, 5):
        fresh = least_squares()
        NeumannInner(fresh.model, eta, inner_steps=k, damping=damping).step(fresh.loss_closure)
        error = fresh.flat() - w - newton
        # exactly: the error of zero steps, contracted k + 1 times
        expected = -torch.linalg.matrix_power(contraction, k + 1) @ newton
        torch.testing.assert_close(error, expected, rtol=0, atol=1e-12)
        errors.append(float(error.norm()))
        assert errors[-1] <= rho ** (k + 1) * float(newton.norm()) * (1 + 1e-9) + 1e-14
    assert (errors[-1] / errors[-2]) ** (1 / 5) == pytest.approx(rho, rel=1e-2)


def test_many_inner_steps_are_a_newton_cg_step() -> None:
    a, b = least_squares(), least_squares()
    eta = 1.0 / float(torch.linalg.eigvalsh(a.hessian()).max())
    NeumannInner(a.model, eta, inner_steps=500).step(a.loss_closure)
    NewtonCG(b.model, tau=0.0, cg_tol=1e-13).step(b.loss_closure)
    torch.testing.assert_close(a.flat(), b.flat(), rtol=0, atol=1e-9)


def test_no_inner_steps_is_gradient_descent() -> None:
    problem = make_problem("conv")
    w = problem.flat()
    g = gradient_at(problem, w)
    NeumannInner(problem.model, 0.1, lr=0.3, inner_steps=0).step(problem.loss_closure)
    torch.testing.assert_close(problem.flat(), w - 0.3 * g, rtol=0, atol=1e-14)


def test_one_batch_one_set_of_random_numbers_and_statistics_once() -> None:
    problem, other = make_problem("batch_norm"), make_problem("batch_norm")
    other.model(other.x)
    masks: list[Tensor] = []

    class Recorder(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            masks.append(super().forward(torch.ones_like(input)).detach())
            return input * masks[-1]

    problem.model.append(Recorder(0.5))  # type: ignore[operator]  # a Sequential
    NeumannInner(problem.model, 0.1, inner_steps=3).step(problem.loss_closure)
    assert len(masks) == 4
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    for a, b in zip(problem.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_and_maximize() -> None:
    whole, split = least_squares(), least_squares()

    def parts() -> Iterator[Tensor]:
        for rows in (slice(0, 10), slice(10, 30)):
            z = split.model(split.x[rows])
            yield -len(z) / len(split.x) * split.loss(z, split.y[rows])

    NeumannInner(whole.model, 0.1, inner_steps=3).step(whole.loss_closure)
    NeumannInner(split.model, 0.1, inner_steps=3, maximize=True).step(parts)
    torch.testing.assert_close(whole.flat(), split.flat(), rtol=0, atol=1e-13)


def test_errors_by_name() -> None:
    problem = least_squares()
    w = problem.flat()
    opt = NeumannInner(problem.model, 0.1)
    with pytest.raises(ClosureError):
        opt.step(lambda: None)
    with pytest.raises(NonFiniteError):
        opt.step(lambda: problem.loss_closure() * float("nan"))
    assert torch.equal(problem.flat(), w)

    def ends_inside() -> Tensor:
        if not torch.equal(problem.flat(), w):
            raise KeyboardInterrupt
        return problem.loss_closure()

    with pytest.raises(KeyboardInterrupt):
        opt.step(ends_inside)
    assert torch.equal(problem.flat(), w)
    for options in ({"inner_lr": 0.0}, {"inner_steps": -1}, {"damping": -1.0}, {"lr": -1.0}):
        with pytest.raises(ConfigurationError):
            NeumannInner(problem.model, **options)
    assert "terms of the Neumann series" in str(opt.explain())
