"""Tables that the package ships: valid, what they claim to be, for the devices that they name and no others."""

import json
import warnings
from pathlib import Path

import pytest

from profiles.tuned_tables import DEVICES, FOLDER, analytic_rows
from tests.support.tuning import FACTOR, H20, H100, MIG, factor_problem
from triton_curv_autotune import Resolver, TuningWarning
from triton_curv_autotune.store import Store
from triton_curv_autotune.table import read_table, shipped_entries, shipped_tables


@pytest.mark.parametrize("name", DEVICES)
def test_rows_are_valid_and_analytic_ones_are_the_defaults(name: str) -> None:
    """Red after a change of an op's default, space or examples: run `python -m profiles.tuned_tables`."""
    table, refused = read_table((FOLDER / f"{name}.json").read_bytes())
    assert refused == []
    analytic = {entry.place: entry.config for entry in table.entries if entry.kind == "analytic"}
    assert analytic == {entry.place: entry.config for entry in analytic_rows(DEVICES[name][0])}
    for entry in table.entries:
        assert entry.provenance.date
        assert entry.environment.triton
        assert (entry.kind == "measured") == bool(entry.measurements)


def test_each_device_finds_its_rows_by_all_its_names() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(DEVICES)
    for limits, names in DEVICES.values():
        assert len(shipped_entries(limits, shipped_tables())) >= 40
        for name in names:
            alias = type(limits)(limits.platform, limits.multiprocessors, limits.shared_memory, name, limits.arch)
            found = shipped_entries(alias, shipped_tables())
            assert {entry.problem.limits for entry in found} == {alias}
    for stranger in (H20, MIG):
        assert shipped_entries(stranger, shipped_tables()) == []


def test_a_look_up_says_that_a_row_is_analytic(tmp_path: Path) -> None:
    resolver = Resolver(lambda: Store(tmp_path))
    problem = factor_problem(k=1 << 15, n=1024, limits=H100)
    with pytest.warns(TuningWarning, match="'analytic'"):
        assert resolver.explain_choice(FACTOR, problem).source == "analytic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolver.resolve(FACTOR, problem)


def test_tables_have_one_row_a_line() -> None:
    for path in FOLDER.glob("*.json"):
        lines = path.read_text().splitlines()
        assert len(lines) == len(json.loads(path.read_text())["entries"]) + 2
