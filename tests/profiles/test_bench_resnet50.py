"""The ResNet-50 benchmark on a small copy: every optimizer is measured, K-FAC's stages too."""

import pytest
import torch

from profiles import bench_resnet50
from profiles.bench_resnet50 import Setup, measure


def test_a_small_copy_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One round that counts, since there is no time for more."""
    monkeypatch.setattr(bench_resnet50, "CYCLE", 2)
    setup = Setup(batch=2, image=32, device=torch.device("cpu"), compiled=False, depths=(1, 1), width=4)
    rows = list(measure(setup, rounds=3, budget=0.0))
    assert "time is over after 1 of 3 rounds" in capsys.readouterr().out
    assert [row["optimizer"] for row in rows if not row["stage"]][:3] == ["sgd", "adamw", "kfac"]
    assert {"backward", "step", "inverse", "apply"} <= {row["stage"] for row in rows if row["optimizer"] == "kfac"}
    assert all(float(str(row["ms"])) > 0 for row in rows if not row["stage"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU, where there is none")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench_resnet50"])
    assert bench_resnet50.main() == 3
    assert "needs a CUDA device" in capsys.readouterr().err
