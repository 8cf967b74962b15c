"""Order of the look-up: override, learned, default."""

import dataclasses

import pytest
import torch

from triton_curv_autotune import UnknownOpError, learn, override, resolve
from triton_curv_kernels.factor import FactorProblem, default_config

OP = "accumulate_factor_"


def test_default_then_learned_then_override() -> None:
    problem = FactorProblem(batch=1, k=4096, n=513, dtype=torch.bfloat16)
    default = default_config(problem)
    assert resolve(OP, problem) == default
    assert resolve(OP, problem) is resolve(OP, dataclasses.replace(problem))
    better = dataclasses.replace(default, num_stages=default.num_stages + 1)
    best = dataclasses.replace(default, num_warps=1)
    learn(OP, problem, better)
    assert resolve(OP, problem) is better
    assert resolve(OP, dataclasses.replace(problem, k=8192)) is not better
    with override(OP, best):
        with override(OP, default):
            assert resolve(OP, problem) is default
        assert resolve(OP, problem) is best
    assert resolve(OP, problem) is better


def test_an_op_without_configs_is_named() -> None:
    with pytest.raises(UnknownOpError, match="flash_attention"):
        resolve("flash_attention", 0)
    with pytest.raises(UnknownOpError, match="expected one of"), override("gemm", None):
        pass
