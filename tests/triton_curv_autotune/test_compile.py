"""Configs are constants of compiled graphs, and torch's caches of graphs know which."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.offline import TracedKernels, traced_kernels
from triton_curv_autotune import Resolver, install
from triton_curv_autotune.store import Store
from triton_curv_kernels.choice import set_chooser
from triton_curv_kernels.factor import FactorConfig, FactorProblem, accumulate_factor_


def compile_in_a_process(folder: Path, *factors: int) -> list[list[str]]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_CURV_CACHE_DIR": str(folder / "tuned"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    command = [sys.executable, "-m", "tests.support.compiled_choice", *map(str, factors)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_a_tuning_run_between_two_processes_does_not_poison_torchs_caches(tmp_path: Path) -> None:
    """The second process finds the first one's graph, unless another config was stored in between."""
    assert compile_in_a_process(tmp_path, 2) == [["2", "0"]]
    assert compile_in_a_process(tmp_path, 2, 3) == [["2", "1"], ["3", "0"]]


@pytest.fixture
def resolver(tmp_path: Path) -> Iterator[Resolver]:
    resolver = Resolver(lambda: Store(tmp_path), lambda: ())
    set_chooser(resolver.resolve, lambda: "the tables' digest")
    yield resolver
    install()


def arguments(k: int = 4096) -> list[Any]:
    return [torch.zeros(70, 70, device="cuda"), torch.zeros(k, 70, device="cuda")]


def accumulate(factor: Tensor, rows: Tensor) -> None:
    accumulate_factor_(factor, rows)


@pytest.mark.parametrize(("split", "kernels"), [(1, 1), (4, 2)])
def test_the_graph_holds_the_kernels_of_the_chosen_config(resolver: Resolver, split: int, kernels: int) -> None:
    """A config that splits K takes a second kernel: the look-up happens while the op is traced."""
    with resolver.override("accumulate_factor_", FactorConfig(64, 32, SPLIT_K=split)):
        assert traced_kernels(accumulate, arguments) == TracedKernels(kernels, [])


def test_symbolic_sizes_are_looked_up_by_what_they_were_traced_with(resolver: Resolver) -> None:
    asked: list[FactorProblem] = []

    def chooser(op: str, problem: Any) -> Any:
        asked.append(problem)
        return resolver.resolve(op, problem)

    set_chooser(chooser)

    def dynamic() -> list[Any]:
        factor, rows = arguments()
        torch._dynamo.mark_dynamic(rows, 0)
        return [factor, rows]

    traced_kernels(accumulate, dynamic)
    assert {(type(problem.k), problem.k) for problem in asked} == {(int, 4096)}


def test_the_tables_digest_is_a_constant_of_the_graph(resolver: Resolver) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(accumulate, backend=backend, fullgraph=True)(torch.zeros(5, 5), torch.ones(3, 5))
    (graph,) = graphs
    (call,) = [node for node in graph.graph.nodes if "accumulate_factor_" in str(node.target)]
    assert call.args[-1].partition(":")[2] == "the tables' digest"  # after that of the sources
