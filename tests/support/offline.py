"""Compile Triton kernels for a GPU that is not here: no GPU, no CUDA driver, only the Triton wheel.

    launches = dry_launches("sm_90", lambda: launch_some_op(*meta_tensors))   # the real launcher, on device="meta"
    result = report(launches[0])                                              # registers, spills, instructions
    kernels, opaque = traced_kernels(step, lambda: [torch.empty(8, device="cuda")])   # in one fullgraph trace

All refuse to run under TRITON_INTERPRET=1: one process cannot both interpret and compile.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

Arch = Literal["sm_80", "sm_90", "sm_100", "gfx942"]


class Machine(NamedTuple):
    """A GPU: Triton's target, multiprocessors, bytes of shared memory a program may use, its matrix instruction."""

    target: GPUTarget
    multiprocessors: int
    shared_memory: int
    matrix_instruction: str


MACHINES: dict[Arch, Machine] = {
    "sm_80": Machine(GPUTarget("cuda", 80, 32), 108, 163 * 1024, "HMMA"),
    "sm_90": Machine(GPUTarget("cuda", 90, 32), 132, 227 * 1024, "HGMMA"),
    "sm_100": Machine(GPUTarget("cuda", 100, 32), 148, 227 * 1024, "UTCMMA"),
    "gfx942": Machine(GPUTarget("hip", "gfx942", 64), 304, 64 * 1024, "MFMA"),
}

# instruction class -> pattern of its opcodes, in SASS (NVIDIA) and in GCN assembly (AMD)
SASS = {
    "HGMMA": r"[HQIB]GMMA",
    "UTCMMA": r"UTC\w*MMA",
    "HMMA": r"[HQIOD]MMA",
    "LDL": r"LDL",
    "STL": r"STL",
    "LDGSTS": r"LDGSTS",
    "LDG": r"LDG(?!STS)",
    "STG": r"STG",
    "LDG.128": r"LDG\S*\.128",
    "STG.128": r"STG\S*\.128",
    "ATOM": r"(ATOMG?|REDG?)\b",  # of global memory
    "FFMA": r"FFMA",
    "total": r"[A-Z]",
}
PTX = {
    "matrix": r"(@%p\d+ )?(wgmma\.mma_async|mma\.sync|tcgen05\.mma)",
    "ATOM": r"(@%p\d+ )?(atom|red)\.(\w+\.)*global",
    "total": r"(@!?%p\d+ )?[a-z]",
}
GCN = {
    "MFMA": r"v_(mfma|smfmac)",
    "scratch": r"scratch_(load|store)",
    "global_load": r"(global|buffer)_load",
    "global_store": r"(global|buffer)_store",
    "load.128": r"(global|buffer)_load_dwordx4",
    "store.128": r"(global|buffer)_store_dwordx4",
    "atomic": r"(global|buffer|flat)_atomic",
    "total": r"[a-z]+_",
}


class Launch(NamedTuple):
    """One launch: kernel name, grid and Triton's compiled kernel (`.asm`, `.metadata`)."""

    name: str
    grid: tuple[int, ...]
    compiled: Any


class OfflineDriver:
    """Just enough of a Triton driver to compile and to launch into nothing."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.utils = self
        self.launches: list[Launch] = []

    def get_current_target(self) -> GPUTarget:
        return self.machine.target

    def get_current_device(self) -> str:  # Triton's caches are keyed by it
        return f"{self.machine.target.backend}:{self.machine.target.arch}"

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {
            "max_shared_mem": self.machine.shared_memory,
            "multiprocessor_count": self.machine.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": self.machine.target.warp_size,
        }

    def load_binary(self, name: str, *args: object) -> tuple[None, str, int, int, int]:
        return None, name, 0, 0, 1024  # module, function, registers, spills, threads: `report` reads the true ones

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *args: None


@contextmanager
def offline_target(arch: Arch) -> Iterator[OfflineDriver]:
    """Launches inside compile for `arch`, raise OutOfResources if they exceed its shared memory, and run nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("expected the compiler, got TRITON_INTERPRET=1: run this test without it")
    driver = OfflineDriver(MACHINES[arch])
    run = JITFunction.run

    def recording(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        driver.launches.append(Launch(self.__name__, tuple(grid) if isinstance(grid, Sequence) else (), compiled))
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(JITFunction, "run", recording)
        yield driver


def dry_launches(arch: Arch, launch: Callable[[], object]) -> list[Launch]:
    """Call `launch`, a real launcher on tensors of device "meta", and return what it launched, compiled for `arch`."""
    with offline_target(arch) as driver, set_wrap_triton_enabled(False):  # a plain launch, not a node of a graph
        launch()
    return driver.launches


@dataclass(frozen=True)
class Report:
    """What the binary of one kernel holds; `counts` are static instructions by class (keys of SASS or GCN)."""

    name: str
    arch: Arch
    registers: int
    spills: int
    shared: int
    fits_shared: bool
    counts: Counter[str]

    @property
    def matrix_instructions(self) -> int:
        """Tensor-core (or matrix-core) instructions."""
        return self.counts[MACHINES[self.arch].matrix_instruction]


def report(launch: Launch) -> Report:
    """Registers, spills, shared memory and instruction counts, read from the binary itself."""
    metadata = launch.compiled.metadata
    arch: Arch = next(a for a, machine in MACHINES.items() if machine.target.arch == metadata.target.arch)
    if "cubin" in launch.compiled.asm:
        registers, spills, counts = _read_cubin(launch.name, launch.compiled.asm["cubin"])
    else:
        registers, spills, counts = _read_gcn(launch.compiled.asm["amdgcn"])
    fits = metadata.shared <= MACHINES[arch].shared_memory
    return Report(launch.name, arch, registers, spills, metadata.shared, fits, counts)


def quick_report(launch: Launch) -> Report:
    """`report` without disassembling: a kernel without a stack spills nothing; instructions are counted in PTX."""
    asm, metadata = launch.compiled.asm, launch.compiled.metadata
    if "cubin" not in asm:
        return report(launch)
    found = re.search(rf"Function {re.escape(launch.name)}:\s*REG:(\d+) STACK:(\d+)", _cuobjdump(asm["cubin"]))
    assert found is not None, launch.name
    if int(found[2]) > 0:
        return report(launch)
    arch: Arch = next(a for a, machine in MACHINES.items() if machine.target.arch == metadata.target.arch)
    counts = _count([line.strip() for line in asm["ptx"].splitlines()], PTX)
    counts[MACHINES[arch].matrix_instruction] = counts["matrix"]
    fits = metadata.shared <= MACHINES[arch].shared_memory
    return Report(launch.name, arch, int(found[1]), 0, metadata.shared, fits, counts)


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(tool), *options, "-res-usage", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_cubin(name: str, cubin: bytes) -> tuple[int, int, Counter[str]]:
    text = _cuobjdump(cubin, "-sass")
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    counts = _count(opcodes, SASS)
    found = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+)", text)
    assert found is not None, text
    return int(found[1]), counts["LDL"] + counts["STL"], counts


def _read_gcn(assembly: str) -> tuple[int, int, Counter[str]]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found is not None, f"no .{key} in the assembly"
        return int(found[1])

    counts = _count([line.strip() for line in assembly.splitlines()], GCN)
    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count"), counts


def _count(opcodes: list[str], classes: dict[str, str]) -> Counter[str]:
    return Counter({name: sum(bool(re.match(pattern, op)) for op in opcodes) for name, pattern in classes.items()})


def wide_loads(launch: Launch) -> int:
    """16-byte loads from global memory, to registers or to shared memory."""
    asm = launch.compiled.asm
    if "amdgcn" in asm:
        return sum("load_dwordx4" in line for line in asm["amdgcn"].splitlines())
    text: str = asm["ptx"]
    vectors = ("ld.global.v4.b32", "ld.global.v2.b64", "ld.global.L1::evict_last.v4", "cp.async.cg.shared.global")
    return sum(any(vector in line for vector in vectors) for line in text.splitlines())


class TracedKernels(NamedTuple):
    """Number of inlined Triton launches in a graph, and the names of our ops that stayed opaque in it."""

    inlined: int
    opaque: list[str]


def traced_kernels(
    step: Callable[..., object], make_args: Callable[[], list[Any]], arch: Arch = "sm_90"
) -> TracedKernels:
    """Trace `step(*make_args())` with torch.compile(fullgraph=True) on fake CUDA tensors, down to kernel launches.

    `make_args` builds its tensors with `device="cuda"`: no CUDA is needed, they are fake. Fails if there is more than
    one graph. Uses no autograd (a CPU build of torch aborts there).
    """
    graphs: list[tuple[torch.fx.GraphModule, Sequence[Tensor]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append((graph, inputs))
        return graph.forward

    torch._dynamo.reset()
    with offline_target(arch), FakeTensorMode(), torch.no_grad():
        torch.compile(step, backend=backend, fullgraph=True)(*make_args())
        assert len(graphs) == 1, f"expected one graph, got {len(graphs)}"
        graph, inputs = graphs[0]
        flat = make_fx(dispatch_functionalize(lambda *tensors: graph(*tensors)))(*inputs)
    targets = [str(node.target) for node in flat.graph.nodes if node.op == "call_function"]
    return TracedKernels(
        targets.count("triton_kernel_wrapper_functional"), [t for t in targets if t.startswith("triton_curv.")]
    )
