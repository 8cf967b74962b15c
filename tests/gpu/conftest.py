"""Every test here needs a CUDA device: `pytest -m gpu`, or `python -m profiles.gpu_check`."""

import os
import sys
from collections.abc import Generator

import pytest
import torch

from profiles.machine import is_spoiled


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End one of several processes whose CUDA context a failed test has spoiled: a new one runs the tests left."""
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and is_spoiled(torch.device("cuda")):
        item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
        print(f"\n{item.nodeid} has spoiled CUDA\n{report.longreprtext}", file=sys.stderr, flush=True)
        os._exit(1)
    return report


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
