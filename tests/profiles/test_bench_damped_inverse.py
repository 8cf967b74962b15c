"""The accuracy table of damped inverses: its matrices, and that no hyperpower row is worse than Cholesky's."""

import csv
import math
from pathlib import Path

import pytest
import torch

from profiles import bench_damped_inverse
from profiles.bench_damped_inverse import Row, damped_of, rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("kappa", [1e1, 1e4])
def test_matrices_have_their_condition(kappa: float) -> None:
    made = damped_of(kappa, 24, 0, CPU)
    values = torch.linalg.eigvalsh(made.damped)
    assert (values[-1] / values[0]).item() == pytest.approx(kappa, rel=1e-2)
    identity = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(made.damped @ made.inverse, identity, rtol=0, atol=1e-9)


def test_rows_compare_with_cholesky() -> None:
    found = list(rows(32, 1, CPU, (1e2, 1e6)))
    assert [(row.kappa, row.method, row.start) for row in found[:5]] == [
        (1e2, "cholesky", ""),
        *((1e2, f"hyperpower order {order}", start) for order in (2, 3) for start in ("cold", "warm")),
    ]
    for place in (0, 5):
        cholesky, *others = found[place : place + 5]
        for row in others:
            assert row.error <= cholesky.error
            assert 0 < row.steps <= bench_damped_inverse.MOST
            assert row.residual < 3e-8 * row.kappa + 1e-6
    warm = {row.method: row.steps for row in found[:5] if row.start == "warm"}
    cold = {row.method: row.steps for row in found[:5] if row.start == "cold"}
    assert all(warm[method] < cold[method] for method in warm)


def test_main_appends_rows_with_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = Row(8, 1e2, "cholesky", "", 0, 1e-6, math.inf)
    monkeypatch.setattr(bench_damped_inverse, "rows", lambda *_: [row])
    monkeypatch.setattr("sys.argv", ["bench_damped_inverse", "--device", "cpu", "--csv", str(tmp_path / "d.csv")])
    bench_damped_inverse.main()
    assert "1e+02 cholesky" in capsys.readouterr().out
    with (tmp_path / "d.csv").open() as file:
        (written,) = csv.DictReader(file)
    assert (written["method"], written["error"], written["torch"]) == ("cholesky", "1e-06", torch.__version__)
