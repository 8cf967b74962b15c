"""``triton-curv doctor``: versions, device, what each op takes, what works here, and what to do if it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import triton_curv as tc
from triton_curv.cli import BAD_INPUT
from triton_curv.training.environment import hardware, versions
from triton_curv_kernels.backend import VARIABLE, BackendError, use_reference

TIMEOUT = 120


@dataclass(frozen=True)
class Check:
    """One thing that works or does not; `advice` says what to do about it."""

    name: str
    works: bool
    detail: str
    advice: str = ""


def run_doctor(as_json: bool) -> int:
    """Print the report; 0 if everything works, else 2."""
    facts = {**{k: v or "not installed" for k, v in versions().items()}, **_device_facts()}
    checks = [_guarded(name, check, advice) for name, check, advice in CHECKS]
    if as_json:
        print(json.dumps({"facts": facts, "ops": ops(), "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(facts, checks)
    return 0 if all(check.works for check in checks) else BAD_INPUT


def ops() -> dict[str, str]:
    """For each registered op, "reference" or "triton": what a call on the default device takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        taken = "reference" if use_reference(torch.empty(0, device=device)) else "triton"
    except BackendError as error:
        taken = str(error)
    return dict.fromkeys(sorted(_op_names()), taken)


def _op_names() -> Iterator[str]:
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        if namespace == "triton_curv":
            yield rest.partition(".")[0]


def _device_facts() -> dict[str, str]:
    found = hardware()
    facts = {"cpu": f"{found['cpu']}, {found['cores']} cores"}
    facts["gpu"] = ", ".join(found["gpus"]) or "none that torch sees"
    facts[VARIABLE] = os.environ.get(VARIABLE, "not set (auto)")
    return facts


def _guarded(name: str, check: Callable[[], str], advice: str) -> Check:
    try:
        return Check(name, True, check())
    except Exception as error:  # whatever breaks is what a doctor is there to tell
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", advice)


def _train_once(model: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> tc.KFAC:
    optimizer = tc.KFAC(model)
    for _ in range(2):
        forward(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _check_capture() -> str:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    blocks = _train_once(model, model).blocks
    return f"{len(blocks)} blocks have factors: " + ", ".join(sorted(blocks["0"].factors()))


def _check_compile() -> str:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    _train_once(model, torch.compile(model, fullgraph=True))
    return "a model with taps compiles into one graph"


def _check_interpreter() -> str:
    program = (
        "import torch\n"
        "from triton_curv_kernels.factor import launch_accumulate_factor_\n"
        "x, c = torch.randn(5, 3), torch.zeros(3, 3)\n"
        "launch_accumulate_factor_(c, x)\n"
        "torch.testing.assert_close(c, x.T @ x)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return "a Triton kernel runs without a GPU and is right"


def _check_gpu_kernel() -> str:
    if not torch.cuda.is_available():
        return "skipped: torch sees no GPU, so ops take their references"
    from triton_curv_kernels import accumulate_factor_

    x, c = torch.randn(64, 32, device="cuda"), torch.zeros(32, 32, device="cuda")
    accumulate_factor_(c, x)
    torch.testing.assert_close(c.double(), x.double().T @ x.double(), rtol=1e-3, atol=1e-3)
    return f"a Triton kernel runs on {torch.cuda.get_device_name()} and is right"


def _check_caches() -> str:
    folders = {
        "tuning": Path(os.environ.get("TRITON_CURV_CACHE_DIR") or platformdirs.user_cache_dir("triton_curv")),
        "triton": Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    return ", ".join(f"{name} {folder}" for name, folder in folders.items())


CHECKS: tuple[tuple[str, Callable[[], str], str], ...] = (
    ("capture", _check_capture, "report it with this output: K-FAC cannot work here"),
    ("torch.compile", _check_compile, "install a C++ compiler (g++) for the CPU, or run without torch.compile"),
    ("triton on the GPU", _check_gpu_kernel, "install the triton that your torch was built with: pip install -U torch"),
    ("triton interpreter", _check_interpreter, "pip install triton (Linux only); ops then take their references"),
    ("caches writable", _check_caches, "set TRITON_CURV_CACHE_DIR and TRITON_CACHE_DIR to folders you may write to"),
)


def _print(facts: dict[str, str], checks: list[Check]) -> None:
    console = Console()
    for name, value in facts.items():
        console.print(f"{name:22} {value}", highlight=False, soft_wrap=True)
    taken = ops()
    for backend in sorted(set(taken.values())):
        names = ", ".join(name for name, value in taken.items() if value == backend)
        console.print(f"{'ops by ' + backend:22} {names}", highlight=False, soft_wrap=True)
    table = Table()
    for column in ("", "check", "what came of it"):
        table.add_column(column, overflow="fold")
    for check in checks:
        detail = check.detail if check.works else f"{check.detail}\n-> {check.advice}"
        table.add_row("ok" if check.works else "[red]no[/red]", check.name, detail)
    console.print(table)
