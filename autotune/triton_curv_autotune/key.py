"""What a measurement belongs to: environment (device, compiler, policy), op with its kernel source, problem.

Keys are dataclasses in memory and canonical JSON in files; a digest of that JSON names the file.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from triton_curv_autotune.policy import POLICY
from triton_curv_kernels.backend import DeviceLimits, device_limits

SCHEMA = 1


@dataclass(frozen=True)
class Environment:
    """All that a time depends on besides op and problem.

    The device is named because limits alone don't tell an H100 from an H200 or an H20; a MIG slice differs in its name
    and in its multiprocessors. `assembler` is ptxas' version, or ROCm's; `policy` is how times were taken.
    """

    device: str
    arch: str
    multiprocessors: int
    shared_memory: int
    triton: str
    assembler: str
    policy: str

    def limits(self) -> DeviceLimits:
        """The device as kernels see it."""
        platform: Literal["cuda", "hip"] = "hip" if self.arch.startswith("gfx") else "cuda"
        return DeviceLimits(platform, self.multiprocessors, self.shared_memory, self.device, self.arch)


@lru_cache(maxsize=64)
def environment(limits: DeviceLimits) -> Environment:
    """The environment of a device in this process."""
    device = (limits.name, limits.arch, limits.multiprocessors, limits.shared_memory)
    return Environment(*device, triton.__version__, _assembler(limits), digest(dataclasses.asdict(POLICY))[:12])


def _assembler(limits: DeviceLimits) -> str:
    if limits.platform == "hip":
        return f"rocm {torch.version.hip or ''}"
    generation = re.fullmatch(r"sm_(\d+)", limits.arch)
    tools = triton.knobs.nvidia
    tool = tools.ptxas_blackwell if generation and int(generation[1]) >= 100 else tools.ptxas
    return f"ptxas {tool.version}"


def local_devices() -> list[DeviceLimits]:
    """The GPUs of this process, each kind once."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return list(dict.fromkeys(device_limits(torch.device("cuda", index)) for index in range(count)))


@lru_cache(maxsize=64)
def source_digest(files: tuple[Path, ...]) -> str:
    """Of an op's kernel files: a change in one of them makes what was measured before it a miss."""
    return digest([file.read_text(encoding="utf-8") for file in files])[:12]


def canonical(data: Any) -> str:
    """JSON with one spelling for each value."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: Any) -> str:
    """SHA-256 of the canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def encode(value: Any) -> dict[str, Any]:
    """A problem, configuration or environment as JSON; a problem's device is not a part: the environment holds it."""
    named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: _plain(item) for name, item in named.items() if not isinstance(item, DeviceLimits)}


def _plain(item: Any) -> Any:
    if isinstance(item, torch.dtype):
        return str(item).removeprefix("torch.")
    if isinstance(item, tuple):
        return [_plain(part) for part in item]
    return encode(item) if dataclasses.is_dataclass(item) else item


def full_key(environment: Environment, op: str, source: str, problem: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of the store holds as its key, in full."""
    return {
        "schema": SCHEMA,
        "environment": encode(environment),
        "op": op,
        "source": source,
        "problem": dict(problem),
    }


def file_of(key: Mapping[str, Any]) -> Path:
    """Path of a key's file in a store: device and versions, then op and source, then problem."""
    return folder_of(key["environment"], key["op"], key["source"]) / f"{digest(key['problem'])[:20]}.json"


def folder_of(environment: Mapping[str, Any], op: str, source: str) -> Path:
    """Folder of all problems of an op in an environment."""
    device = re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower())[:60].strip("-")
    place = f"{device or 'none'}-{digest(environment)[:12]}"
    return Path(f"v{SCHEMA}", place, f"{re.sub(r'[^A-Za-z0-9_]', '-', op)[:60]}-{source}")
