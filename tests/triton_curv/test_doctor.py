"""`triton-curv doctor`: what it finds here, and that it names what is broken and what to do."""

import json

import pytest

from triton_curv.cli import doctor, main


def test_it_reports_facts_ops_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["facts"]["torch"]
    assert report["ops"]["accumulate_factor_"] in ("reference", "triton")
    assert {check["name"]: check["works"] for check in report["checks"]} == {
        "capture": True,
        "torch.compile": True,
        "triton on the GPU": True,
        "triton interpreter": True,
        "caches writable": True,
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
