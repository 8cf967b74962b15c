"""`damped_inverse_`: the Triton kernels in the interpreter against the reference, and the reference against float64."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.poison import poisoned_allocations
from triton_curv_kernels import damped_inverse as damped_inverse_file
from triton_curv_kernels.backend import VARIABLE, DeviceLimits, UnsupportedInputError
from triton_curv_kernels.damped_inverse import (
    CONFIGS,
    NUMERICS,
    DampedInverseConfig,
    DampedInverseProblem,
    damped_inverse_,
    default_config,
    launch_damped_inverse_,
    prune,
)
from triton_curv_kernels.damped_inverse_work import _tables, lay_out

SMALL = DampedInverseConfig(16, 16, 16, 1, 1, "ieee", "fp64")
UNEVEN = DampedInverseConfig(32, 16, 16, 1, 1, "tf32x3", "fp64")
IN_FP32 = replace(SMALL, residual_precision="ieee")
CUDA, HIP = DeviceLimits(), DeviceLimits("hip", 304, 64 * 1024)


def spd(batch: int, n: int, seed: int = 0) -> Tensor:
    """Positive definite matrices, most of whose eigenvalues are small."""
    x = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT / max(n, 1)


def of_condition(kappa: float, n: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """F (1, n, n) and s (1,) in fp32, F + s I of eigenvalues from 1 to 1 / kappa; and that sum."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
    values = torch.logspace(0, -torch.log10(torch.tensor(kappa)).item(), n, dtype=torch.float64)
    factor = (q * (values - values.min() * 0.999)) @ q.mT
    factor = ((factor + factor.mT) / 2).float()[None]
    shift = (values.min() * 0.999).float()[None]
    return factor, shift, (factor[0] + shift * torch.eye(n)).double()


def true_residuals(inverses: Sequence[Tensor], factors: Sequence[Tensor], shifts: Sequence[Tensor]) -> Tensor:
    """||I - A X||_F in float64, from the definition; A = F + s I as fp32 can hold it."""
    norms = []
    for x, f, s in zip(inverses, factors, shifts, strict=True):
        identity = torch.eye(f.shape[-1], dtype=f.dtype)
        damped = (f + s[:, None, None] * identity).double()
        norms.append((identity.double() - damped @ x.double()).flatten(1).norm(dim=1))
    return torch.cat(norms)


def banks() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Warm, hopeful, spoiled and hopeless starts; sizes 1, less than a tile, whole tiles, several; an empty bank."""
    factors = [spd(2, 5), spd(1, 37), spd(1, 1), spd(2, 16), spd(0, 3), spd(1, 0)]
    shifts = [torch.linspace(0.01, 0.1, len(f)) for f in factors]
    starts = [
        torch.full_like(factors[0], float("nan")),
        torch.linalg.inv(1.02 * factors[1] + 0.01 * torch.eye(37)),
        torch.zeros(1, 1, 1),
        torch.stack([100 * torch.eye(16), torch.linalg.inv(factors[3][1] + 0.101 * torch.eye(16))]),
        spd(0, 3),
        spd(1, 0),
    ]
    return starts, factors, shifts


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("config", "order"),
    [(SMALL, 2), (SMALL, 3), (UNEVEN, 3), (None, 3)],
    ids=["order 2", "order 3", "uneven", "default"],
)
def test_launch_takes_the_steps_of_the_reference(config: DampedInverseConfig | None, order: int) -> None:
    for iterations in (0, 1, 8):
        starts, factors, shifts = banks()
        expected, results = ([x.clone() for x in starts] for _ in "ab")
        residuals = damped_inverse_(expected, factors, shifts, iterations, order)
        with poisoned_allocations():
            measured = launch_damped_inverse_(results, factors, shifts, iterations, order, config)
        torch.testing.assert_close(results, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
        torch.testing.assert_close(measured, residuals, rtol=1e-3, atol=2e-6, equal_nan=True)
        if iterations:
            assert all(torch.equal(x, x.mT) for x in results)
    torch.testing.assert_close(measured.double(), true_residuals(results, factors, shifts), rtol=1e-3, atol=1e-8)
    assert measured.max() < 1e-4


@pytest.mark.interpreter
def test_launch_with_residuals_in_fp32() -> None:
    starts, factors, shifts = banks()
    residuals = launch_damped_inverse_(starts, factors, shifts, 9, 3, IN_FP32)
    assert residuals.max() < 1e-3
    torch.testing.assert_close(residuals.double(), true_residuals(starts, factors, shifts), rtol=0.5, atol=1e-4)


@pytest.mark.interpreter
def test_first_call_equals_second() -> None:
    runs = []
    for _ in range(2):
        starts, factors, shifts = banks()
        runs.append([launch_damped_inverse_(starts, factors, shifts, 2, 3, SMALL), *starts])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def spoiled_bank(spoil: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    factor = spd(3, 20)
    factor[1, 3, 7] = factor[1, 7, 3] = spoil
    return [torch.eye(20).repeat(3, 1, 1)], [factor], [torch.full((3,), 0.1)]


@pytest.mark.interpreter
@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_launch_reports_what_is_not_finite(spoil: float) -> None:
    residuals = launch_damped_inverse_(*spoiled_bank(spoil), config=SMALL)
    assert residuals.isfinite().tolist() == [True, False, True]
    assert residuals[[0, 2]].max() < 1e-4


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_reference_reports_what_is_not_finite(spoil: float) -> None:
    residuals = damped_inverse_(*spoiled_bank(spoil))
    assert residuals.isfinite().tolist() == [True, False, True]
    assert residuals[[0, 2]].max() < 1e-4


# kappa -> steps that suffice from a cold start, order 2 and 3
STEPS = {1e1: (7, 4), 1e2: (9, 6), 1e3: (10, 7), 1e4: (12, 8), 1e5: (13, 9), 1e6: (14, 9), 1e7: (16, 11)}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("kappa", STEPS)
def test_cold_start_is_as_accurate_as_cholesky(kappa: float, order: int) -> None:
    """In fp32, against float64; the residual is true, and the steps are as few as the docstring says."""
    factor, shift, damped = of_condition(kappa)
    inverse = torch.linalg.inv(damped)
    x = torch.full_like(factor, float("nan"))
    residual = damped_inverse_([x], [factor], [shift], STEPS[kappa][order - 2], order)

    def error(approximate: Tensor) -> float:
        return float((approximate.double() - inverse).norm() / inverse.norm())

    by_cholesky = torch.cholesky_inverse(torch.linalg.cholesky(damped.float()))
    assert error(x[0]) <= error(by_cholesky)
    torch.testing.assert_close(residual.double(), true_residuals([x], [factor], [shift]), rtol=1e-3, atol=0)
    assert residual.item() < 3e-8 * kappa + 1e-6
    assert torch.equal(x, x.mT)


@pytest.mark.parametrize("order", [2, 3])
def test_condition_1e8_is_reported_as_it_is(order: int) -> None:
    factor, shift, _ = of_condition(1e8)
    x = torch.zeros_like(factor)
    residual = damped_inverse_([x], [factor], [shift], 20, order)
    assert residual.item() > 0.1
    torch.testing.assert_close(residual.double(), true_residuals([x], [factor], [shift]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("order", "steps"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("kappa", [1e2, 1e4])
def test_warm_start_after_a_moving_average_takes_few_steps(kappa: float, order: int, steps: int) -> None:
    """From the inverse before 5 % of the average were replaced, which does not commute with the matrix now.

    Of kappa = 1e4 its residual is above 1, though that of the next step is not.
    """
    factor, shift, damped = of_condition(kappa)
    samples = torch.randn(96, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    half = torch.linalg.cholesky(damped) @ samples
    x = torch.linalg.inv((damped - 0.05 * half @ half.mT / 192) / 0.95).float()[None]
    start = damped_inverse_([x.clone()], [factor], [shift], 0, order)
    assert (start.item() > 1) == (kappa > 1e3)
    residual = damped_inverse_([x], [factor], [shift], steps, order)
    assert residual.item() < 1e-3
    torch.testing.assert_close(residual.double(), true_residuals([x], [factor], [shift]), rtol=1e-3, atol=1e-7)


def test_float64_reaches_its_precision() -> None:
    factor, shift, _ = of_condition(1e4)
    x, wide = torch.zeros_like(factor).double(), factor.double()
    assert damped_inverse_([x], [wide], [shift.double()], 12, 3).item() < 1e-8
    assert true_residuals([x], [wide], [shift.double()]).item() < 1e-8


def test_indefinite_matrix_is_not_called_inverted() -> None:
    """No start leads to the inverse of a matrix with eigenvalues of both signs: the residual says so."""
    factor = torch.diag(torch.tensor([1.0, 2.0, -0.5]))[None]
    x = torch.eye(3)[None]
    residual = damped_inverse_([x], [factor], [torch.tensor([0.1])], 20, 3)
    assert not residual.item() < 0.5


def test_dead_layer_is_inverted() -> None:
    """F = 0 with the least shift that KFAC gives it."""
    x, factor = torch.eye(4)[None], torch.zeros(1, 4, 4)
    shift = torch.tensor([torch.finfo(torch.float32).tiny ** 0.5])
    assert damped_inverse_([x], [factor], [shift]).item() < 1e-5
    torch.testing.assert_close(x[0], torch.eye(4) / shift)


def test_no_banks() -> None:
    assert damped_inverse_([], [], []).shape == (0,)


@pytest.mark.parametrize(
    ("x", "f", "s", "options", "message"),
    [
        ((1, 3, 3), (1, 3, 4), (1,), {}, r"got \(1, 3, 3\), \(1, 3, 4\) and \(1,\)"),
        ((1, 3, 3), (1, 3, 3), (2,), {}, r"and \(2,\)"),
        ((3, 3), (3, 3), (3,), {}, r"expected inverse \(b, n, n\)"),
        ((1, 3, 3), (1, 3, 3), (1,), {"order": 4}, "order 2 or 3"),
        ((1, 3, 3), (1, 3, 3), (1,), {"iterations": -1}, "iterations >= 0"),
    ],
)
def test_errors_are_named(
    x: tuple[int, ...], f: tuple[int, ...], s: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    for op in (damped_inverse_, launch_damped_inverse_):
        with pytest.raises(UnsupportedInputError, match=message):
            op([torch.zeros(x)], [torch.zeros(f)], [torch.zeros(s)], **options)


def test_dtypes_and_lists_that_do_not_fit_are_named() -> None:
    one, wide = torch.eye(3)[None], torch.eye(3, dtype=torch.float64)[None]
    with pytest.raises(UnsupportedInputError, match="lists of one length, got 1 inverses, 2 factors"):
        damped_inverse_([one], [one, one], [torch.ones(1)])
    with pytest.raises(UnsupportedInputError, match=r"one dtype at place 0.* torch.float64"):
        damped_inverse_([one], [wide], [torch.ones(1)])
    with pytest.raises(UnsupportedInputError, match=r"expected fp32 tensors, got \['torch.float64'\]"):
        launch_damped_inverse_([wide], [wide], [torch.ones(1).double()])


@pytest.mark.interpreter
def test_variable_makes_the_op_launch_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    factors, shifts = [spd(1, 5)], [torch.ones(1)]
    expected = damped_inverse_([torch.eye(5)[None]], factors, shifts, 2)
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setattr(damped_inverse_file, "damped_inverse_reference", None)
    result = damped_inverse_([torch.eye(5)[None]], factors, shifts, 2)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(("block_n", "block_m"), [(16, 16), (64, 32)])
def test_work_covers_every_tile_once(block_n: int, block_m: int) -> None:
    shapes, places = ((2, 100), (1, 1), (3, 64)), (0, 2, 3)
    padded, _ = lay_out(shapes, block_n)
    matrices, tiles, triangle, panels = _tables(shapes, places, block_n, block_m)
    assert sorted(matrices[:, 5]) == list(range(6))
    assert (np.diff(matrices[:, 1]) <= 0).all()  # the largest first
    assert {int(x) for x in matrices[:, 0]} == {b.offset + i * b.padded**2 for b in padded for i in range(b.batch)}
    for m, (_, n, size, first, first_panel, _) in enumerate(matrices):
        assert n <= size < n + block_n
        own = tiles[tiles[:, 0] == m]
        assert {tuple(x) for x in own[:, 1:]} == {
            (i, j) for i in range(0, size, block_m) for j in range(0, size, block_n)
        }
        assert len(own) == len(tiles[first : first + len(own)]) == (size // block_m) * (size // block_n)
        assert (tiles[first : first + len(own), 0] == m).all()
        lower = [tuple(x) for x in triangle[triangle[:, 0] == m][:, 1:]]
        assert sorted(lower) == sorted((i, j) for i in range(0, size, block_n) for j in range(0, i + 1, block_n))
        assert (panels[first_panel : first_panel + size // block_n, 0] == m).all()


def test_offsets_past_31_bits() -> None:
    """Thirty matrices of LLaMA-7B's largest size take 3.6e9 elements."""
    matrices, *_ = _tables(((30, 11008),), (0,), 64, 32)
    assert matrices.dtype == np.int64
    assert matrices[-1, 0] == 29 * 11008**2 > 2**31


def test_config_goes_through_integers() -> None:
    assert all(DampedInverseConfig.from_ints(c.to_ints()) == c for c in CONFIGS)
    assert all(hasattr(SMALL, field) for field in NUMERICS)


@pytest.mark.parametrize("limits", [CUDA, HIP, DeviceLimits("cuda", 128, 99 * 1024)], ids=["h100", "mi300", "ada"])
@pytest.mark.parametrize("n", [1, 16, 20, 33, 577, 4608])
def test_default_is_one_of_the_pruned_configs(n: int, limits: DeviceLimits) -> None:
    problem = DampedInverseProblem(n, limits)
    default = default_config(problem)
    assert default in prune(CONFIGS, problem)
    assert default.residual_precision == ("fp64" if limits == CUDA else "ieee")


@pytest.mark.parametrize(
    ("refused", "problem"),
    [
        (DampedInverseConfig(64, 64, 16, 8, 2), DampedInverseProblem(577)),  # tiles of 64 in fp64: not on sm_100
        (DampedInverseConfig(64, 32, 16, 8, 2), DampedInverseProblem(577, HIP)),
        (DampedInverseConfig(64, 32, 16, 8, 2), DampedInverseProblem(20)),
        (DampedInverseConfig(64, 32, 16, 8, 2, "tf32x3", "ieee"), DampedInverseProblem(577, HIP)),
        (DampedInverseConfig(16, 16, 32, 1, 2, "ieee", "ieee"), DampedInverseProblem(16)),  # reads the next row
    ],
)
def test_prune_refuses(refused: DampedInverseConfig, problem: DampedInverseProblem) -> None:
    assert prune([refused], problem) == []


def test_blocks_that_do_not_divide_a_tile_are_named() -> None:
    inverse, factor, shift = torch.empty(1, 16, 16), torch.empty(1, 16, 16), torch.empty(1)
    with pytest.raises(UnsupportedInputError, match=r"BLOCK_K that divide BLOCK_N, got .*BLOCK_K=32"):
        launch_damped_inverse_([inverse], [factor], [shift], config=DampedInverseConfig(16, 16, 32, 1))
