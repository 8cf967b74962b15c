"""Every region of a step on fake CUDA tensors: one graph each, our kernels inlined and counted, none opaque."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "traced_regions.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("g++ builds the guard")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[2]), *filter(None, sys.path)])}
    command = [sys.executable, str(PROGRAM), str(tmp_path_factory.mktemp("guard"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def inlined(count: int) -> dict[str, Any]:
    return {"launches": count, "opaque": []}


@pytest.mark.parametrize(("inverse", "launches"), [("cholesky", 1), ("neumann", 1 + 72)])
def test_regions_of_kfac(inverse: str, launches: int, found: Any) -> None:
    """A fold packs all sums in one launch; a refresh unpacks them in one, and iterates in products of three sizes.

    Apply: three launches precondition all blocks, and one moves each parameter.
    """
    assert found[f"kfac {inverse}"] == {
        "fold": inlined(1),
        "refresh": inlined(launches),
        "apply": inlined(3 + 6),
        "common step": inlined(3 + 6),
    }


def test_neumann(found: Any) -> None:
    """One launch a parameter, one to finish the norm."""
    assert found["neumann"] == inlined(6 + 1)


def test_recurrences(found: Any) -> None:
    """For two tensors: dots and ||r||^2 take one launch each and one to finish, x, r and p one each."""
    assert found["cg"] == {"update": inlined(6), "turn": inlined(5), "move": inlined(0), "scaled": inlined(0)}
