"""Memory counted without storage equals what real optimizers hold."""

import pytest
import torch
from torch import nn

from profiles import bench_memory
from profiles.bench_memory import MIB, OURS, counted, held_by, measured, soap_bytes


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))


@pytest.mark.parametrize("optimizer", ["kfac", "neumann"])
def test_meta_tensors_count_as_real_ones(optimizer: str) -> None:
    with torch.device("meta"):
        meta = small()
    assert held_by(OURS[optimizer], meta) == held_by(OURS[optimizer], small()) > 0


def test_soap_by_hand() -> None:
    weights = 2 * (20 * 30 + 30 + 30 * 5 + 5) + 2 * (20**2 + 30**2) + 2 * (30**2 + 5**2)
    assert soap_bytes(small()) == 4 * weights


def test_a_measured_step_agrees_with_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "MODELS", {"small": (small, lambda: torch.randn(4, 20))})
    rows = {row.optimizer: row for row in counted("small")}
    assert rows["adamw"].steady_mib == pytest.approx(2 * rows["adamw"].parameters_mib)
    steady = measured("small", "adamw").steady_mib
    assert steady == pytest.approx(rows["adamw"].steady_mib, abs=100 / MIB)  # and the number of each parameter's step
    assert measured("small", "kfac").steady_mib == pytest.approx(rows["kfac"].steady_mib, rel=0.01)
