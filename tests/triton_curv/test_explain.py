"""`triton-curv explain`: costs by hand, memory as real optimizers hold it, models by name, the page in a browser."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from markupsafe import escape
from torch import Tensor, nn

from profiles.bench_memory import held_by
from triton_curv import KFAC, ConfigurationError
from triton_curv.blocks.cost import rows_of_call
from triton_curv.cli import main
from triton_curv.explanation import explain
from triton_curv.explanation.observe import observe, without_data
from triton_curv.explanation.page import render
from triton_curv.explanation.units import readable_bytes, readable_flops

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Everything(nn.Module):
    """One layer of most kinds, one frozen and one without a block."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(12, 8, 2, stride=2, bias=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.scale = nn.Parameter(torch.ones(11))
        self.still = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.tokens(tokens))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.up(self.mix(x.transpose(1, 2))).transpose(1, 2)
        y: Tensor = self.head(x) * self.scale * self.still
        return y


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1, bias=False))


def test_costs_by_hand() -> None:
    told = explain(without_data(perceptron()), "net", (5, 3), factor_interval=4, inverse_interval=8)
    first, second = told.rows
    assert (first.layer, first.kind, first.numbers, first.exact) == ("0", "Linear", 8, "approximate")
    assert first.factors == "A 4x4, G 2x2"
    assert first.statistics.flops == 2 * 5 * (4 * 5 // 2 + 2 * 3 // 2)
    assert first.inverse.flops == 4**3 + 2**3
    assert first.apply.flops == 2 * (2 * 2 * 4 + 2 * 4 * 4)
    assert second.statistics.flops == 2 * 5 * (3 + 1)
    # forward: both products; backward: weight gradients of both, input gradient of the second (the input needs none)
    assert told.model_flops == 2 * 5 * (6 + 2) + 2 * 5 * (6 + 2 + 2)
    stages = {stage.stage: stage for stage in told.stages}
    assert stages["statistics"].flops_per_step == (130 + 40) / 4
    assert stages["inverses"].flops_per_step == (72 + 9) / 8
    assert told.flops_per_step == sum(stage.flops_per_step for stage in told.stages)


def test_memory_and_rows_are_those_of_a_real_optimizer() -> None:
    torch.manual_seed(0)
    told = explain(without_data(Everything()), "net", (3, 6))
    model = Everything()
    optimizer = KFAC(model)
    rules = {name: block.rule for name, block in optimizer.blocks.items()}
    model(torch.randint(11, (3, 6))).square().mean().backward()
    rows = {row.layer: row for row in told.rows}
    assert rows.keys() >= rules.keys()
    kept = {row.parameter: row for row in optimizer.explain().rows if row.factors}
    for name in optimizer.blocks:
        real = next(kept[p] for p in rows[name].parameters if p in kept)
        assert (rows[name].factor_bytes, rows[name].inverse_bytes) == (real.factor_bytes, real.inverse_bytes)
        assert rows[name].apply.flops == real.solve_flops
    twin = without_data(Everything())
    twin_rules = {name: block.rule for name, block in KFAC(twin).blocks.items()}
    seen = observe(twin, twin_rules, (3, 6), (torch.int64,))
    for name in ("mix", "up"):
        assert sum(rows_of_call(twin_rules[name], *call) for call in seen.calls[name]) == rows_seen(optimizer, name)
    assert sum(rows_of_call(twin_rules["tokens"], *call) for call in seen.calls["tokens"]) == 3 * 6 + 3 * 12
    assert rows["tokens"].calls == 2
    assert rows["scale"].trainer == "adamw"
    assert rows["scale"].moment_bytes >= 2 * 4 * 11
    assert rows["still"].exact == "frozen"
    assert told.input_dtype == "int64"
    assert 0 < told.covered < 1


def rows_seen(optimizer: KFAC, name: str) -> float:
    """What A of a block is divided by after one backward pass."""
    return float(optimizer.blocks[name].counts[0])


def test_all_memory_is_what_building_the_optimizer_brings_to_life() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(64, 60), nn.PReLU(), nn.Linear(60, 40))

    told = explain(without_data(net()), "net", (2, 3, 4, 4))
    assert sum(told.memory().values()) == pytest.approx(held_by(KFAC, without_data(net())), rel=0.02)


def test_a_whole_norm_fisher_is_exact_and_unreached_layers_are_named() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.used(x))
            return y

    rows = {row.layer: row for row in explain(without_data(Spare()), "net", (2, 3), norm_fisher="full").rows}
    assert rows["norm"].exact == "exact"
    assert "not reached" in rows["spare"].note
    assert rows["spare"].statistics.flops == 0
    assert "not reached" not in rows["used"].note


def test_what_the_model_does_not_take_is_a_named_error() -> None:
    with pytest.raises(ConfigurationError, match=r"does not take an input of shape \(2, 4\)"):
        explain(without_data(perceptron()), "net", (2, 4))

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ConfigurationError, match="function of its parameters"):
        explain(without_data(Constant()), "net", (2, 2))


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "digits-cnn", "--batch", "16"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("BatchNorm2d", "A 144x144, G 32x32", "100.0%", "renewal of all inverses"))
    assert main(["explain", "digits-cnn", "--batch", "16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["input_shape"] == [16, 1, 8, 8]
    assert [row["layer"] for row in told["rows"]] == ["0", "1", "3", "4", "6", "7", "10"]
    assert told["rows"][0]["statistics"]["flops"] == 2 * 16 * 64 * (45 + 136)


def test_the_command_shows_what_ranks_share(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["explain", "digits-cnn", "--world-size", "4", "--machine", "h100", "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("4 ranks", "balance", "x SGD's", "fullest rank", "predicted", "H100"))
    assert "x SGD" in page.read_text(encoding="utf-8")
    command = ["explain", "digits-cnn", "--world-size", "8", "--shard-size", "4", "--parallel", "fsdp", "--json"]
    assert main(command) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert ranks["grid"] == {"replicas": 2, "rows": 1, "columns": 4}
    assert len(ranks["bytes_per_step"]) == 4
    assert {"gradients of replicas", "gradients to workers"} <= {transfer["stage"] for transfer in ranks["sent"]}
    assert main(["explain", "digits-cnn", "--world-size", "6", "--shard-size", "4"]) == 2
    assert "divide the world of 6 ranks, got 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("explain nothing", "expected a scenario"),
        ("explain tests.triton_curv.test_explain:nothing", "expected module:factory"),
        ("explain tests.triton_curv.test_explain:CHROMIUM", "function that builds a model|torch.nn.Module"),
        ("explain tests.triton_curv.test_explain:readable_bytes", "without arguments"),
        ("explain digits-cnn --input 3", "expected no --input"),
        ("explain x:y --input 3,4", "like 3x224x224"),
        ("explain x:y --batch 0", "batch of at least 1"),
        ("explain x:y --input-dtype int8", "expected --input-dtype among"),
    ],
)
def test_bad_input_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_names_of_libraries(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    models = SimpleNamespace(list_models=lambda: ["small"], get_model=lambda name: perceptron())
    timm = SimpleNamespace(list_models=lambda: ["tagged"], create_model=lambda name: perceptron())
    found: dict[str, Any] = {"torchvision": SimpleNamespace(models=models), "torchvision.models": models, "timm": timm}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert main(["explain", "small", "--input", "3"]) == 0
    assert "A 4x4, G 2x2" in capsys.readouterr().out
    assert main(["explain", "torchvision/small", "--input", "3"]) == 0
    assert "A 4x4, G 2x2" in capsys.readouterr().out
    assert main(["explain", "timm/small", "--input", "3"]) == 2
    assert "(timm has no model of this name)" in capsys.readouterr().err
    assert main(["explain", "timm/tagged.of_weights", "--input", "3"]) == 0
    assert "A 4x4, G 2x2" in capsys.readouterr().out
    assert main(["explain", "large", "--input", "3"]) == 2
    assert "torchvision has no model of this name" in capsys.readouterr().err


def test_a_factory_that_reads_its_weights_is_built_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tests.triton_curv.test_explain:reads_weights", "--input", "3"]) == 0
    assert "A 4x4, G 2x2" in capsys.readouterr().out


def reads_weights() -> nn.Module:
    model = perceptron()
    assert float(next(model.parameters()).detach().abs().sum()) >= 0
    return model


def test_units() -> None:
    assert [readable_bytes(n) for n in (0, 1536, 3 * 2**30)] == ["0 B", "1.5 KiB", "3 GiB"]
    assert [readable_flops(n) for n in (0, 1500, 2e12)] == ["0", "1.5 k", "2 T"]


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str, str], str]:
    """The page's DOM after `script` ran in headless Chromium; fails on any message of its console."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")

    def run(page: str, script: str) -> str:
        file = tmp_path / "page.html"
        file.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path}", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        return done.stdout

    return run


def test_the_page_is_whole_and_sorts_in_a_browser(browse: Callable[[str, str], str]) -> None:
    told = explain(without_data(Everything()), "<b>&net", (3, 6))
    page = render(told, "rank 0: 1 < 2")
    assert "http" not in page.replace("http-equiv", "")
    assert "src=" not in page
    seen = browse(page, "document.querySelectorAll('#layers th')[6].click()")
    assert f'data-rows="{len(told.rows)}"' in seen
    assert "<h1>K-FAC on &lt;b&gt;&amp;net</h1>" in seen
    assert "rank 0: 1 &lt; 2" in seen
    order = re.findall(r'<td class="name">([^<]*)</td>', seen)
    by_memory = sorted(told.rows, key=lambda row: -row.memory)
    assert order == [row.layer for row in by_memory]
    assert all(str(escape(row.note)) in page for row in told.rows)
