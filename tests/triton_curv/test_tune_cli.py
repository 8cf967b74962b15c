"""`triton-curv tune` and its subcommands, without a GPU: planted times, files, exit codes."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.tuning import (
    FACTOR,
    FAKE,
    MOMENTUM,
    PATCH,
    FakeBench,
    entry_for,
    factor_problem,
    list_problem,
    other_config,
)
from triton_curv.cli import main, problems, tables, tuning
from triton_curv_autotune import tune as tune_file
from triton_curv_autotune.key import environment
from triton_curv_autotune.registry import get_op
from triton_curv_autotune.resolve import process
from triton_curv_autotune.store import Store
from triton_curv_autotune.table import Table, write_table
from triton_curv_kernels.apply_inverse import ApplyProblem
from triton_curv_kernels.choice import ListProblem
from triton_curv_kernels.damped_inverse import DampedInverseProblem
from triton_curv_kernels.factor import FactorProblem
from triton_curv_kernels.patch import PatchProblem
from triton_curv_kernels.patch_geometry import PatchGeometry
from triton_curv_kernels.symmetric import SymmetricProblem

SHAPES = [{"op": MOMENTUM, "problem": {"numel": 1 << 20, "dtype": "float32"}}]
PROBLEM = list_problem()
FAST = other_config(MOMENTUM, PROBLEM)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("TRITON_CURV_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.json").write_text(json.dumps(SHAPES))
    process.reload()
    yield Store(tmp_path / "store")
    process.reload()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeBench:
    """A machine with one FAKE GPU, on which FAST takes half the default's time."""
    bench = FakeBench(lambda config: 0.5 if config == FAST else 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "device_limits", lambda device: FAKE)
    monkeypatch.setattr(tables, "local_devices", lambda: [FAKE])
    monkeypatch.setattr(tune_file, "GpuBench", lambda device: bench)
    monkeypatch.setattr(tables, "GpuBench", lambda device: bench)
    return bench


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code = main(["tune", *arguments, "--json"])
    return SimpleNamespace(code=code, **json.loads(capsys.readouterr().out))


def test_tune_measures_keeps_and_exports(gpu: FakeBench, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "--shapes", "shapes.json", "--export", "mine.json")
    assert (shown.code, shown.candidates_left) == (0, 0)
    (row,) = shown.entries
    assert (row["op"], row["device"], row["ms"], row["gain"]) == (MOMENTUM, "Fake GPU", 0.5, 2.0)
    assert process.resolve(MOMENTUM, PROBLEM) == FAST
    (entry,) = store.entries(environment(FAKE))
    assert entry.config == FAST
    assert run(capsys, "verify", "mine.json").bad == 0
    assert run(capsys, "clear").removed == 1
    assert run(capsys, "import", "mine.json").taken == 1
    assert list(store.entries(environment(FAKE))) == [entry]
    assert gpu.released == 2


def test_a_table_on_the_screen(gpu: FakeBench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--shapes", "shapes.json"]) == 0
    shown = capsys.readouterr().out
    for words in ("Fake GPU", "problem", "source", "gain", "x2.000", "1 entries"):
        assert words in shown
    assert main(["tune", "show"]) == 0
    assert "store" in capsys.readouterr().out


def test_verify_finds_a_lost_margin_and_a_wrong_result(
    gpu: FakeBench, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write(entry_for(MOMENTUM, PROBLEM, FAST))
    gpu.ms = lambda config: 1.0
    lost = run(capsys, "verify")
    assert (lost.code, lost.measured, lost.bad) == (1, 1, 1)
    assert [(row["op"], row["reason"], row["gain"]) for row in lost.lost] == [(MOMENTUM, "", 1.0)]
    gpu.wrong = lambda config: "result 0 is off"
    assert main(["tune", "verify"]) == 1
    assert "result 0 is off" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_finished(gpu: FakeBench, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.stop_at = 2
    Path("shapes.json").write_text(json.dumps([*SHAPES, {**SHAPES[0], "op": "cg_update_"}]))
    assert main(["tune", "--shapes", "shapes.json"]) == 130
    shown = capsys.readouterr()
    assert MOMENTUM in shown.out
    assert shown.err == "triton-curv: interrupted\n"
    left = len(get_op(MOMENTUM).candidates(PROBLEM)) - 1
    assert f"1 entries, {left} candidates not measured yet" in shown.out  # those of the other op
    assert len(list(store.entries(environment(FAKE)))) == 1


def test_a_default_that_fails_is_exit_code_1(gpu: FakeBench, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.wrong = lambda config: "no room"
    assert main(["tune", "--shapes", "shapes.json"]) == 1
    assert "the default fails: no room" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Tuning says so with exit code 3; everything about files works, for the device that they name."""
    assert main(["tune", "--shapes", "shapes.json"]) == 3
    assert "torch sees none; --dry-run lists" in capsys.readouterr().err
    planned = run(capsys, "--shapes", "shapes.json", "--dry-run")
    assert planned.code == 0
    assert planned.candidates == planned.estimated_seconds == planned.problems[0]["candidates"] > 3
    assert run(capsys, "--dry-run").candidates > 1000

    entry = entry_for(MOMENTUM, PROBLEM, FAST)
    write_table(Path("table.json"), Table((entry,)))
    assert run(capsys, "import", "table.json").taken == 1
    assert {row["source"] for row in run(capsys, "show").entries} == {"store", "shipped, analytic"}
    assert run(capsys, "export", "again.json").entries == 1
    assert Path("again.json").read_bytes() == Path("table.json").read_bytes()
    checked = run(capsys, "verify", "again.json")
    assert (checked.code, checked.valid, checked.measured) == (0, 1, 0)
    assert run(capsys, "clear").removed == 0
    assert run(capsys, "clear", "--all").removed == 1


def test_merge_unites_measurements(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, *_ = get_op(MOMENTUM).candidates(PROBLEM)[1:]
    for name, config, ratio in (("a", one, 0.5), ("b", two, 0.4)):
        write_table(Path(name), Table((entry_for(MOMENTUM, PROBLEM, config, ratio),)))
    write_table(Path("c"), Table((entry_for(FACTOR, factor_problem(), other_config(FACTOR, factor_problem())),)))
    assert run(capsys, "merge", "a", "b", "c", "--out", "all").entries == 2
    run(capsys, "import", "all")
    merged = {e.op.name: e for e in store.entries(environment(FAKE))}
    assert merged[MOMENTUM].config == two
    assert [m.config for m in merged[MOMENTUM].measurements][1:] == [one, two]


def test_bad_rows_of_a_table_are_named_and_left_out(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    good = entry_for(MOMENTUM, PROBLEM, FAST)
    old = dataclasses.replace(good, source="0123456789ab")
    table = json.loads(Table((good, old)).to_text())
    table["entries"] += [{**good.to_json(), "config": {"BLOCK": 3, "num_warps": 4}}, {"op": "gemm"}, 7]
    Path("table.json").write_text(json.dumps(table))
    taken = run(capsys, "import", "table.json")
    assert (taken.taken, taken.other_kernels, [row["place"] for row in taken.refused]) == (1, 1, [2, 3, 4])
    assert run(capsys, "verify", "table.json").code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shapes absent.json", "expected a list of {'op': ..., 'problem': ...} in absent.json"),
        ("--shapes shapes.json --scenario reg-bos", "expected one of --model, --scenario and --shapes"),
        ("--budget 0", "expected a budget and a batch above 0"),
        ("--scenario mnist", "expected a scenario among"),
        ("--model no.such:model", "expected module:factory, a scenario"),
        ("--model json:dumps", "expected module:factory, a scenario"),
        ("--model builtins:dict", "to give a torch.nn.Module, got dict"),
        ("--model digits-cnn --dtype int8", "expected a dtype among float32, bfloat16, float16, got 'int8'"),
        ("--model small_models:net --input 3xlarge", "expected an input shape like 3x224x224, got '3xlarge'"),
        ("--model small_models:net --input 16 --channels-last", "expected samples of three sizes"),
        ("--model small_models:net --input 2x9x9", "the model does not take an input of shape (32, 2, 9, 9)"),
        ("verify absent.json", "absent.json is no table"),
        ("merge shapes.json --out out.json", "shapes.json is no table"),
        ("export absent/out.json", "cannot write absent/out.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str, message: str, small_models: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1


def net() -> nn.Module:
    """Sizes that stay what they are in their bucket."""
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 16, bias=False))


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("small_models")
    module.net = net  # type: ignore[attr-defined]  # set here
    monkeypatch.setitem(sys.modules, "small_models", module)


def test_problems_of_a_model_are_those_of_its_training_step(small_models: None) -> None:
    """The layers' factors and the parameters' updates, written out by hand; the pass needs no memory."""
    found = problems.from_spec("small_models:net", 32, "16x8x8", "bfloat16", FAKE, channels_last=True)
    rows, half = 32 * 64, torch.bfloat16
    sizes = (16 * 9 + 1, 32, 32 * 64, 16)  # of A, G of the convolution and of the linear layer
    geometry = PatchGeometry.of((8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    numel = 32 * 16 * 9 + 32 + 16 * 32 * 64
    elements = (32 * sizes[0], 16 * 32 * 64)
    products = elements[0] * ((32 + sizes[0]) // 2) + elements[1] * ((16 + 32 * 64) // 2)
    inverting = DampedInverseProblem.of([(1, n) for n in sizes if n > 32], FAKE)
    packed = sum(n * (n + 1) // 2 for n in sizes)
    full = torch.float32
    assert set(found) == {
        (PATCH, PatchProblem(32, 16, 1, geometry, half, ones=True, limits=FAKE)),
        (FACTOR, FactorProblem(1, rows, 32, half, limits=FAKE)),
        (FACTOR, FactorProblem(1, 32, 32 * 64, half, limits=FAKE)),
        (FACTOR, FactorProblem(1, 32, 16, half, limits=FAKE)),
        ("damped_inverse_", inverting),
        ("damped_inverse_", DampedInverseProblem(32, FAKE, 2)),
        ("apply_damped_inverse", ApplyProblem(sum(elements), full, FAKE, products // sum(elements), aligned=False)),
        ("pack_symmetric", SymmetricProblem(32 * 64, packed, full, full, FAKE)),
        ("unpack_symmetric", SymmetricProblem(32 * 64, packed, full, full, FAKE)),
        *((name, ListProblem(numel, half, FAKE)) for name in (MOMENTUM, "neumann_update_")),
        *((name, ListProblem(numel, full, FAKE)) for name in ("cg_update_", "cg_direction_", "cg_dots")),
    }
    assert len(found) == 14


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_kernel_of_one_pixel_is_a_plain_factor(channels_last: bool) -> None:
    layer = nn.Conv2d(16, 32, 1, bias=False)
    found = problems.from_module(layer, (2, 16, 8, 8), "float32", FAKE, channels_last)
    names = [name for name, p in found if getattr(p, "per_group", getattr(p, "n", 0)) == 16]
    assert FACTOR in names
    assert PATCH not in names


def test_a_shared_weight_has_one_update_and_one_pair_of_factors() -> None:
    one, two = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    two.weight = one.weight
    found = dict(problems.from_module(nn.Sequential(one, nn.Tanh(), two), (4, 16), "float32", FAKE))
    assert found["momentum_update_"].numel == 16 * 16
    assert found["damped_inverse_"].batch == 2


def test_a_scenario_by_either_name(capsys: pytest.CaptureFixture[str]) -> None:
    by_scenario = run(capsys, "--scenario", "digits-cnn", "--dry-run")
    assert by_scenario.problems == run(capsys, "--model", "digits-cnn", "--dry-run").problems
    assert any(row["op"] == FACTOR for row in by_scenario.problems)
