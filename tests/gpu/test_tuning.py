"""Tuning on the device: right results by every op's default, times that are times, no memory left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tuning import MOMENTUM, resolver_on, small_problem
from triton_curv_autotune.bench import GpuBench
from triton_curv_autotune.policy import MeasurementPolicy
from triton_curv_autotune.registry import get_op, op_names
from triton_curv_autotune.store import Store
from triton_curv_autotune.tune import tune, verify
from triton_curv_kernels.backend import device_limits
from triton_curv_kernels.choice import ListProblem

QUICK = MeasurementPolicy(warm_ms=20, calls=4, rounds=5)


def on_device(name: str, device: torch.device) -> Any:
    op = get_op(name)
    return op.bucket(op.on(small_problem(name), device_limits(device)))


@pytest.mark.parametrize("name", op_names())
def test_defaults_are_right_and_can_be_timed(name: str, device: torch.device) -> None:
    """Checked against float64, in place and in several threads; captured in a CUDA graph; all memory given back."""
    op, problem, bench = get_op(name), on_device(name, device), GpuBench(device, QUICK)
    default, *others = op.candidates(problem)
    configs = [default, *others[:2]]
    before = torch.cuda.memory_allocated(device)
    reasons = bench.check(op, problem, configs)
    assert reasons[0] == ""
    right = [config for config, reason in zip(configs, reasons, strict=True) if not reason]
    times = bench.medians(op, problem, right)
    assert all(0 < ms < 100 for ms in times)
    torch.cuda.synchronize(device)
    assert torch.cuda.memory_allocated(device) - before < 1 << 20  # tables of addresses stay


def test_what_is_tuned_is_used_and_holds(tmp_path: Path, device: torch.device) -> None:
    problem = ListProblem(1 << 20, torch.float32, device_limits(device))
    resolver, bench = resolver_on(tmp_path), GpuBench(device, QUICK)
    (job,) = tune([(MOMENTUM, problem)], 60.0, bench=bench, store=Store(tmp_path), resolver=resolver)
    assert job.failure == ""
    assert not job.todo
    assert resolver.resolve(MOMENTUM, problem) == job.entry.config
    assert resolver_on(tmp_path).explain_choice(MOMENTUM, problem).source == "store"
    (verdict,) = verify([job.entry], bench)
    assert verdict.reason == ""
