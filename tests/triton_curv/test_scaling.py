"""profiles.scaling: rows and a picture, on a few ranks and a small model."""

import csv
from pathlib import Path

import pytest

from profiles import scaling
from triton_curv.costs import Cost
from triton_curv.sharding.layers import FactorSize, LayerSize
from triton_curv.sharding.timeline import Workload


def test_scaling_writes_rows_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = tuple(
        LayerSize(f"{i}", (FactorSize("A", 1, 300), FactorSize("G", 1, 200)), (1, 200, 300)) for i in range(8)
    )
    monkeypatch.setattr(scaling, "RANKS", (1, 4))
    monkeypatch.setattr(scaling, "resnet50_work", lambda: (layers, Workload(10**9, Cost(10**9, 10**6), 10**5)))
    table, picture = tmp_path / "scaling.csv", tmp_path / "scaling.png"
    for _ in range(2):  # the table is written anew
        monkeypatch.setattr("sys.argv", ["scaling", "--csv", str(table), "--png", str(picture)])
        scaling.main()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = sum(map(len, scaling.MEASURED.values()))
    assert len(rows) == points + 2 * len(scaling.CURVES)
    alone, four = (row for row in rows if row["curve"] == scaling.CURVES[0].name)
    assert float(four["mean_ms"]) < float(alone["mean_ms"])
    assert float(alone["sent_mib"]) == 0 < float(four["sgd_mib"]) < float(four["sent_mib"])
    assert picture.read_bytes().startswith(b"\x89PNG")
