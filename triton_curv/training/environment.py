"""What a result was measured with: versions, hardware, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

COMMIT_VARIABLE = "TRITON_CURV_COMMIT"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a result depends on; None where one is not installed."""
    names = ("torch", "triton", "numpy", "triton-curv")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def hardware() -> dict[str, Any]:
    """CPU model, cores, threads torch uses, and the name of each GPU."""
    return {
        "cpu": _cpu_model(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def commit() -> str | None:
    """The git commit of this source tree, with "+" where files differ from it.

    Outside a checkout what TRITON_CURV_COMMIT says, for files that were copied to another machine; None without it.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:  # not installed inside another repository
        return os.environ.get(COMMIT_VARIABLE) or None
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    head = _git(here.parent, "rev-parse", "HEAD")
    return f"{head}+" if head and changed else head


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
