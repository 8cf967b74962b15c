"""Low-rank forms of damped inverses: against dense float64, their error, what they fall back to, resume, compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import triton_curv as tc
from triton_curv.blocks import low_rank
from triton_curv.blocks.low_rank import LowRank, read, times_left_, times_right_, truncate, write_

WIDE = 300


def planted(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    basis: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    matrix: Tensor = (basis * values) @ basis.mT
    return matrix


def error_of(form: LowRank, matrix: Tensor, shift: float) -> float:
    """|(M~ + l)^-1/2 (M - M~) (M~ + l)^-1/2|_2 by dense eigenvalues."""
    root = torch.linalg.cholesky(form.dense())
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    ratios = torch.linalg.eigvalsh(root.mT @ (matrix + shift * identity) @ root)
    return float((ratios - 1).abs().max())


SPECTRA = {
    "steps": torch.cat([torch.linspace(50.0, 20.0, 30), torch.linspace(0.3, 0.0, WIDE - 30)]),
    "geometric": 100.0 * 0.93 ** torch.arange(WIDE),
    "power": 100.0 / (1.0 + torch.arange(WIDE)) ** 1.5,
    "few samples": torch.cat([torch.linspace(9.0, 1.0, 40), torch.zeros(WIDE - 40)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("tolerance", [1.0, 2.0])
def test_error_stays_within_the_bound(spectrum: Tensor, tolerance: float) -> None:
    """Within 1.3 times, from random rows, with the basis of the last time, and while the matrix moves."""
    matrix, other = planted(spectrum.double()), planted(spectrum.double(), seed=1)
    shift, start = 0.5 * float(spectrum.mean()), None
    for renewal in range(10):
        moved = 0.8 * matrix + 0.2 * other if renewal > 4 else matrix
        found = truncate(moved, shift, start, tolerance)
        assert found is not None
        assert found.error <= tolerance
        assert error_of(found.form, moved, shift) <= 1.3 * found.error + 1e-10
        start = found.form.basis
        assert (start @ start.mT - torch.eye(len(start), dtype=start.dtype)).abs().max() < 1e-12


def test_rank_is_what_the_bound_needs() -> None:
    """Thirty directions stand out; the rest lies near its mean."""
    spectrum = torch.cat([torch.linspace(50.0, 20.0, 30), torch.linspace(0.06, 0.04, WIDE - 30)])
    matrix = planted(spectrum.double())
    found = truncate(matrix, 1.0, None, 0.2)
    assert found is not None
    assert found.form.rank == 30
    exact = torch.linalg.inv(matrix + torch.eye(WIDE, dtype=torch.float64))
    assert (found.form.dense() - exact).norm() < 0.01 * exact.norm()


def test_exact_where_the_rest_is_flat() -> None:
    """The dense inverse, when all left-out eigenvalues are the same."""
    spectrum = torch.cat([torch.linspace(50.0, 20.0, 30), torch.full((WIDE - 30,), 0.1)]).double()
    found = truncate(planted(spectrum), 0.7, None, 0.3)
    for _ in range(3):
        assert found is not None
        found = truncate(planted(spectrum), 0.7, found.form.basis, 0.3)
    exact = torch.linalg.inv(planted(spectrum) + 0.7 * torch.eye(WIDE, dtype=torch.float64))
    assert found is not None
    assert (found.form.dense() - exact).abs().max() < 1e-9 * exact.abs().max()


@pytest.mark.parametrize(
    "matrix",
    [
        planted(torch.linspace(2.0, 0.5, WIDE).double()),
        planted(torch.cat([torch.tensor([-9.0]), torch.linspace(5.0, 0.0, WIDE - 1)]).double()),
        torch.full((WIDE, WIDE), torch.nan),
        torch.full((WIDE, WIDE), torch.inf),
    ],
    ids=["flat nowhere", "indefinite", "nan", "inf"],
)
def test_none_where_no_form_fits(matrix: Tensor) -> None:
    """Rather than a wrong inverse."""
    assert truncate(matrix, 1e-3, None, 0.2) is None


def test_nothing_seen_yet_is_a_multiple_of_one() -> None:
    """Of rank 0, so that a layer that is used later has forms then; a diagonal of zeros alone is not nothing."""
    nothing = torch.zeros(WIDE, WIDE, dtype=torch.float64)
    found = truncate(nothing, 0.5, None, 1.5)
    assert found is not None
    assert (found.form.rank, found.form.scale, found.error) == (0, 2.0, 0.0)
    assert truncate(nothing + 1.0 - torch.eye(WIDE, dtype=torch.float64), 1e-3, None, 0.2) is None


def test_products_and_storage() -> None:
    """Products are those with the dense matrix; a form comes back from the place of an inverse as it was put there."""
    torch.manual_seed(0)
    found = truncate(planted(SPECTRA["geometric"].double()), 1.0, None, 0.5)
    assert found is not None
    place = torch.eye(WIDE, dtype=torch.float64)
    assert read(place) is None
    write_(place, found.form)
    form = read(place)
    assert form is not None
    assert all(map(torch.equal, form[:2], found.form[:2]))
    assert form.scale == found.form.scale
    D, E = torch.randn(7, WIDE, dtype=torch.float64), torch.randn(WIDE, 5, dtype=torch.float64)
    assert torch.allclose(times_right_(D.clone(), form), D @ form.dense(), rtol=1e-12, atol=1e-12)
    expected = form.dense() @ E
    assert torch.allclose(times_left_(form, E), expected, rtol=1e-12, atol=1e-12)


# ---- in KFAC


def wide_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, 290), nn.Tanh(), nn.Linear(290, 3))


def batch(seed: int, rows: int = 40) -> tuple[Tensor, Tensor]:
    """Inputs of few directions, as images have them."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(20, WIDE, generator=torch.Generator().manual_seed(99))
    x = torch.randn(rows, 20, generator=g) @ directions + 0.05 * torch.randn(rows, WIDE, generator=g)
    return x, torch.randint(3, (rows,), generator=g)


def train(optimizer: tc.KFAC, model: nn.Module, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def kfac(model: nn.Module, **options: Any) -> tc.KFAC:
    return tc.KFAC(model, max_output_dim=1000, **options)


def test_preconditions_as_the_dense_inverses_do() -> None:
    """With a tight tolerance; `explain` and `health` say the ranks."""
    model = wide_net()
    optimizer = kfac(model, inverse_tolerance=0.02)
    train(optimizer, model, range(3))
    block = optimizer.blocks["0"]
    ranks = optimizer.health()["0"]["ranks"]
    assert 20 <= ranks["A"] < 60
    assert f"A^-1 of rank {ranks['A']}" in str(optimizer.explain())
    gradient = {name: torch.randn_like(p) for name, p in model.get_submodule("0").named_parameters()}
    low = block.precondition(gradient)
    optimizer._store.stay_dense_()
    dense = block.precondition(gradient)  # the form multiplied out
    factors = block.factors()
    shifts = [float(optimizer._store.shifts[optimizer._store.rows(block.keys[name])]) for name in "GA"]
    G, A = (
        torch.linalg.inv(factors[name].double() + shift * torch.eye(len(factors[name]), dtype=torch.float64))
        for name, shift in zip("GA", shifts, strict=True)
    )
    joined = torch.cat([gradient["weight"], gradient["bias"][:, None]], dim=1).double()
    exact = G @ joined @ A
    for found in (low, dense):
        got = torch.cat([found["weight"], found["bias"][:, None]], dim=1).double()
        assert (got - exact).norm() < 0.05 * exact.norm()


def test_dense_where_the_rank_is_too_large() -> None:
    """Inputs that fill all directions: what `inverse="cholesky"` computes, and the same weights."""
    nets = [wide_net(), wide_net()]
    optimizers = [
        kfac(net, inverse_tolerance=1e-3, inverse=how) for net, how in zip(nets, ("low_rank", "cholesky"), strict=True)
    ]
    for step in range(2):
        x = torch.randn(400, WIDE, generator=torch.Generator().manual_seed(step))
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert "A" not in optimizers[0].health()["0"]["ranks"]
    assert torch.equal(optimizers[0].blocks["0"].inverses["A"], optimizers[1].blocks["0"].inverses["A"])


def test_resumes_bit_for_bit() -> None:
    """Ranks, bases and what follows from them are in the state dict; a copy goes on alike."""
    model = wide_net()
    optimizer = kfac(model)
    train(optimizer, model, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(optimizer, model, range(3, 7))
    again = wide_net()
    again.load_state_dict(weights)
    resumed = kfac(again)
    resumed.load_state_dict(saved)
    train(resumed, again, range(3, 7))
    assert resumed.health()["0"]["ranks"] == optimizer.health()["0"]["ranks"] != {}
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_state_is_understood_where_inverses_are_dense() -> None:
    """Forms are multiplied out: one rank's checkpoint continues compiled, on several ranks, or by Cholesky."""
    model = wide_net()
    optimizer = kfac(model)
    train(optimizer, model, range(3))
    other = kfac(copy.deepcopy(model), inverse="cholesky")
    other.load_state_dict(optimizer.state_dict())
    assert other.health()["0"]["ranks"] == {}
    gradient = {name: torch.randn_like(p) for name, p in model.get_submodule("0").named_parameters()}
    expected, got = (each.blocks["0"].precondition(gradient) for each in (optimizer, other))
    assert all((got[name] - expected[name]).norm() < 1e-4 * expected[name].norm() for name in gradient)


def test_failing_factor_keeps_its_form_and_then_falls() -> None:
    """An average that is not finite: the last inverse, then more damping, then the identity; no step is lost."""
    model = wide_net()
    optimizer = kfac(model)
    train(optimizer, model, range(2))
    block = optimizer.blocks["0"]
    before = block.forms()["A"].rank
    optimizer._store.packed(block.keys["A"]).fill_(torch.nan)
    with pytest.warns(tc.NumericalWarning):
        optimizer._curvature.invert()
    assert optimizer.health()["0"]["rung"] == "previous"
    assert block.forms()["A"].rank == before
    for _ in range(4):
        optimizer._curvature.invert()
    assert optimizer.health()["0"]["rung"] == "identity"
    assert "A" not in block.forms()


def test_library_that_throws_leaves_it_to_the_dense_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has a ladder of its own; memory that runs out is an error."""

    def throwing(error: Exception) -> Any:
        def eigh(*_: object) -> Any:
            raise error

        return eigh

    model = wide_net()
    optimizer = kfac(model)
    monkeypatch.setattr(torch.linalg, "eigh", throwing(RuntimeError("injected")))
    train(optimizer, model, range(1))
    assert optimizer.health()["0"]["ranks"] == {}
    assert optimizer.health()["0"]["rung"] == "fresh"
    monkeypatch.setattr(torch.linalg, "eigh", throwing(torch.OutOfMemoryError("injected")))
    with pytest.raises(torch.OutOfMemoryError):
        train(kfac(model), model, range(1))


def test_dense_in_compiled_steps() -> None:
    """With compile=True, and from a trace of `opt.step` on; "low_rank" by name can't be had there."""
    with pytest.raises(tc.ConfigurationError, match="low_rank"):
        kfac(wide_net(), inverse="low_rank", compile=True)
    model = wide_net()
    optimizer = kfac(model, compile={"backend": "aot_eager"})
    train(optimizer, model, range(1))
    assert optimizer.health()["0"]["ranks"] == {}

    eager, model = wide_net(), wide_net()
    reference, optimizer = kfac(eager, inverse="cholesky"), kfac(model, inverse_tolerance=0.02)
    train(reference, eager, range(2))
    train(optimizer, model, range(2))
    assert optimizer.health()["0"]["ranks"]
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for seed in range(2, 5):
        x, y = batch(seed)
        for net, advance, owner in ((model, step, optimizer), (eager, reference.step, reference)):
            owner.zero_grad()
            cross_entropy(net(x), y).backward()
            advance()
    assert optimizer.health()["0"]["ranks"] == {}
    for got, expected in zip(model.parameters(), eager.parameters(), strict=True):
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_narrow_layers_are_dense() -> None:
    """Where nothing is saved."""
    assert low_rank.pays(785, 256)
    assert not low_rank.pays(255, 1000)
    assert not low_rank.pays(289, 32)
