"""What a row of a result was measured on: date, commit, device, driver, versions; rows appended to a tidy CSV."""

import csv
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path

import torch

from triton_curv.training.environment import commit, hardware


def machine_of(device: torch.device) -> dict[str, str]:
    """The columns that tell one machine from another; `driver` is empty on a CPU."""
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "commit": (commit() or "")[:12],
        "device": torch.cuda.get_device_name(device) if cuda else str(hardware()["cpu"]),
        "driver": _driver() if cuda else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }


@cache
def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split()[0]


def append_rows(path: Path, rows: Sequence[Mapping[str, object]], device: torch.device) -> None:
    """Append rows to a CSV, each behind the columns of `machine_of`; floats with five digits."""
    if not rows:
        return
    machine = machine_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*machine, *rows[0]])
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({**machine, **{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}})


def is_spoiled(device: torch.device) -> bool:
    """Whether CUDA answers all that this process asks with an error: after a wrong address, say."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.randn(1, device=device)
        except RuntimeError:
            return True
    return False
