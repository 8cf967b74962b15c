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

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._inductor.utils import fresh_cache

import triton_curv as tc
from triton_curv.cli import BAD_INPUT
from triton_curv.training.environment import hardware, versions
from triton_curv.training.step_bench import apart
from triton_curv_autotune.entry import Measurement, new_entry, provenance_now
from triton_curv_autotune.key import environment
from triton_curv_autotune.registry import get_op
from triton_curv_autotune.store import Store, default_store
from triton_curv_kernels.backend import NO_DEVICE, VARIABLE, BackendError, use_reference
from triton_curv_kernels.choice import ListProblem

TIMEOUT = 120
HOST_OPS = frozenset({"begin_step_"})


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
    """For each registered op, what a call with fp32 tensors on the default device takes.

    "reference", "triton", or "host" for what a graph asks the optimizer's host code to do.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        taken = "reference" if use_reference(torch.empty(0, device=device)) else "triton"
    except BackendError as error:
        taken = str(error)
    return {name: "host" if name in HOST_OPS else taken for name in sorted(_op_names())}


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


def _trained(compiled: bool) -> tuple[tc.KFAC, list[torch.Tensor]]:
    """K-FAC and the weights after two steps of it, model and step compiled or not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        inputs = [torch.randn(8, 4) for _ in range(2)]
    optimizer = tc.KFAC(model, compile=compiled)
    forward = apart(model, fullgraph=True) if compiled else model
    for x in inputs:
        forward(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, [p.detach() for p in model.parameters()]


def _check_capture() -> str:
    blocks = _trained(compiled=False)[0].blocks
    return f"{len(blocks)} blocks have factors: " + ", ".join(sorted(blocks["0"].factors()))


def _check_compile() -> str:
    _, expected = _trained(compiled=False)
    with fresh_cache():  # what was compiled before, by a compiler that may be gone, does not count
        _, weights = _trained(compiled=True)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    return "a model with taps and K-FAC's step compile, and train as they do eagerly"


def _check_cuda_graph() -> str:
    if not torch.cuda.is_available():
        return "skipped: torch sees no GPU"
    model = nn.Linear(4, 3, device="cuda")
    optimizer = tc.KFAC(model, lr=torch.tensor(1e-2, device="cuda"))
    x = torch.randn(8, 4, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            optimizer.zero_grad(set_to_none=False)
            model(x).square().mean().backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    before = model.weight.detach().clone()
    graph.replay()
    if torch.equal(before, model.weight):
        raise RuntimeError("a replayed step moved nothing")
    return "a step of K-FAC is captured in a CUDA graph, and replayed"


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


def _check_triton_cache() -> str:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        pass
    return f"compiled kernels are kept in {folder}"


def _check_tuning_cache() -> str:
    """An entry is written, read back, and damaged, in a folder of its own beside the user's."""
    root = default_store().root
    root.mkdir(parents=True, exist_ok=True)
    op, bucket = get_op("momentum_update_"), ListProblem(1 << 20, torch.float32, NO_DEVICE)
    of_device = environment(NO_DEVICE)
    default = op.default(bucket)
    entry = new_entry(op, of_device, bucket).with_measurements([Measurement(default, 1.0, 1.0)], provenance_now())
    with tempfile.TemporaryDirectory(dir=root, prefix=".doctor-") as folder:
        store = Store(Path(folder))
        store.write(entry)
        if [found.config for found in store.entries(of_device)] != [default]:
            raise RuntimeError("an entry that was written is not read back")
        for path in Path(folder).rglob("*.json"):
            path.write_bytes(path.read_bytes()[:-20])
        if list(store.entries(of_device)):
            raise RuntimeError("a damaged entry is taken for one that is whole")
    return f"entries are written to and read from {root}; damaged ones are left out"


CHECKS: tuple[tuple[str, Callable[[], str], str], ...] = (
    ("taps", _check_capture, "report it with this output: K-FAC cannot work here"),
    (
        "torch.compile",
        _check_compile,
        "install a C++ compiler (g++) or name one in CXX, or run without torch.compile",
    ),
    ("triton on the GPU", _check_gpu_kernel, "install the triton that your torch was built with: pip install -U torch"),
    ("CUDA graph", _check_cuda_graph, "run without CUDA graphs, and report it with this output"),
    ("triton interpreter", _check_interpreter, "pip install triton (Linux only); ops then take their references"),
    ("triton's cache", _check_triton_cache, "set TRITON_CACHE_DIR to a folder you may write to"),
    ("tuning cache", _check_tuning_cache, "set TRITON_CURV_CACHE_DIR to a folder you may write to"),
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
