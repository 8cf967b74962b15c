"""`triton-curv doctor`: what it finds here, and that it names what is broken and what to do."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config

import triton_curv as tc
from triton_curv.cli import doctor, main
from triton_curv_autotune.entry import Entry
from triton_curv_autotune.key import Environment
from triton_curv_autotune.store import Store


def test_it_reports_facts_ops_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["facts"]["torch"]
    assert report["ops"]["accumulate_factor_"] in ("reference", "triton")
    assert report["ops"]["begin_step_"] == "host"
    assert {check["name"]: check["works"] for check in report["checks"]} == {
        "taps": True,
        "torch.compile": True,
        "triton on the GPU": True,
        "CUDA graph": True,
        "triton interpreter": True,
        "triton's cache": True,
        "tuning cache": True,
    }


def test_what_is_broken_is_named_with_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> str:
        raise OSError("no compiler here")

    monkeypatch.setattr(doctor, "CHECKS", (("capture", lambda: "fine", ""), ("compile", broken, "install one")))
    assert main(["doctor"]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "OSError: no compiler here" in printed
    assert "install one" in printed


def test_a_wrong_backend_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_CURV_BACKEND", "cuda")
    monkeypatch.setattr(doctor, "CHECKS", doctor.CHECKS[:1])
    assert main(["doctor", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert "got 'cuda'" in report["ops"]["accumulate_factor_"]
    assert report["checks"][0]["detail"].startswith("BackendError")


def ill(name: str) -> str:
    """What the check of that name says, which must not be that all is well."""
    ((_, check, advice),) = [each for each in doctor.CHECKS if each[0] == name]
    found = doctor._guarded(name, check, advice)
    assert not found.works
    assert found.advice
    return found.detail


def test_taps_that_see_nothing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_curv.optimizers.curvature.attach_taps", lambda *_: [])
    assert "NoStatisticsError" in ill("taps")


def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    # Not monkeypatch: it would end with delattr, which hides the option from later compiles.
    with inductor_config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        detail = ill("torch.compile")
    assert "/nowhere/g++" in detail or "compiler" in detail


def test_a_graph_that_trains_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = doctor._trained

    def wrong(compiled: bool) -> tuple[tc.KFAC, list[Tensor]]:
        optimizer, weights = trained(compiled=False)
        return optimizer, [w * 1.01 if compiled else w for w in weights]

    monkeypatch.setattr(doctor, "_trained", wrong)
    assert "not close" in ill("torch.compile")


@pytest.mark.parametrize("name", ["triton on the GPU", "CUDA graph"])
def test_a_gpu_that_does_not_work_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this one works")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    ill(name)


def test_a_missing_triton_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "no triton here" in ill("triton interpreter")


@pytest.mark.parametrize(
    ("name", "variable"), [("triton's cache", "TRITON_CACHE_DIR"), ("tuning cache", "TRITON_CURV_CACHE_DIR")]
)
def test_a_cache_that_cannot_be_written_is_noticed(
    name: str, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    assert "NotADirectoryError" in ill(name)


@pytest.mark.parametrize("fault", ["lost", "damaged"])
def test_a_tuning_cache_that_gives_back_something_else_is_noticed(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CURV_CACHE_DIR", str(tmp_path))
    entries, kept = Store.entries, list[Entry]()

    def faulty(store: Store, environment: Environment) -> Iterator[Entry]:
        if fault == "damaged":
            kept.extend(entries(store, environment))
        return iter(kept)

    monkeypatch.setattr(Store, "entries", faulty)
    assert ("not read back" if fault == "lost" else "taken for one that is whole") in ill("tuning cache")
    assert not list(tmp_path.iterdir())
