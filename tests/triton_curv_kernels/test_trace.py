"""The ops under torch.library.opcheck and torch.compile: for real on CPU, down to kernel launches on fake CUDA tensors.

The step below is what an optimizer does with them: gather a factor, pack and unpack it, move the parameters.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.decorators import maybe_mark_dynamic

from tests.support.offline import TracedKernels, traced_kernels
from triton_curv_kernels import factor as factor_file
from triton_curv_kernels.backend import VARIABLE
from triton_curv_kernels.factor import FactorConfig, accumulate_factor_
from triton_curv_kernels.momentum import momentum_update_
from triton_curv_kernels.patch import accumulate_patch_factor_
from triton_curv_kernels.symmetric import pack_symmetric, unpack_symmetric

ops = torch.ops.triton_curv
SHAPES = [(8, 4), (5,), (2, 3, 3, 3)]


def tensors(device: str = "cpu") -> list[Any]:
    """Factor (7, 7), rows (K, 6), four lists and hyper."""
    torch.manual_seed(0)
    rows = torch.randn(40, 6, device=device)
    lists = [[torch.randn(shape, device=device) for shape in SHAPES] for _ in range(3)]
    scales = [torch.ones((), device=device) for _ in SHAPES]
    hyper = torch.ones(5, device=device) / 3
    return [torch.zeros(7, 7, device=device), rows, *lists, scales, hyper]


def step(
    factor: Tensor,
    rows: Tensor,
    params: list[Tensor],
    momenta: list[Tensor],
    updates: list[Tensor],
    scales: list[Tensor],
    hyper: Tensor,
) -> list[Tensor]:
    accumulate_factor_(factor, rows, 0.5, 0.9, ones=True)
    packed = pack_symmetric([factor, factor], torch.float32, 2.0)
    matrices = unpack_symmetric(packed, [7, 7], torch.float32, 0.5)
    momentum_update_(params, momenta, updates, scales, hyper)
    return matrices


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    factor, rows, *lists = tensors()
    config = FactorConfig(64, 32, SPLIT_K=2).to_ints()
    return {
        "accumulate_factor_": (ops.accumulate_factor_, (factor, rows, 0.5, 0.9, True, config)),
        "accumulate_factor_ of a batch": (ops.accumulate_factor_, (factor[None, :6, :6], rows[None].mT.bfloat16().mT)),
        "accumulate_factor_ without rows": (ops.accumulate_factor_, (factor, rows[:0], 1.0, 0.0, True)),
        "pack_symmetric": (ops.pack_symmetric, ([factor, factor[:4, :4]], torch.bfloat16, 2.0)),
        "unpack_symmetric": (ops.unpack_symmetric, (torch.randn(9), [3, 2], torch.float16, 0.5)),
        "unpack_symmetric_": (ops.unpack_symmetric_, ([factor, factor[:4, :4].clone()], torch.randn(38), 0.5)),
        "momentum_update_": (ops.momentum_update_, tuple(lists)),
    }


@pytest.mark.parametrize("name", cases())
def test_opcheck(name: str) -> None:
    op, args = cases()[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_cpu_graph_equals_eager(backend: str) -> None:
    eager, compiled = tensors(), tensors()
    torch._dynamo.reset()
    expected = step(*eager)
    results = torch.compile(step, backend=backend, fullgraph=True)(*compiled)
    torch.testing.assert_close([compiled, results], [eager, expected], rtol=1e-6, atol=1e-6)


def test_new_hyper_parameters_need_no_new_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(step, backend=counting, fullgraph=True)
    *args, hyper = tensors()
    for factor in (1.0, 0.5, 0.1):
        compiled(*args, hyper * factor)
    assert len(graphs) == 1


def test_cuda_graph_holds_the_kernels() -> None:
    """One launch for the factor, two for packing, two for unpacking, one for each parameter; nothing opaque."""
    assert traced_kernels(step, lambda: tensors("cuda")) == TracedKernels(1 + 2 + 2 + 3, [])


def test_cuda_graph_of_a_split_factor_holds_two_kernels() -> None:
    def accumulate(factor: Tensor, rows: Tensor) -> None:
        accumulate_factor_(factor, rows, config=FactorConfig(64, 32, SPLIT_K=4))

    def arguments() -> list[Any]:
        return [torch.zeros(70, 70, device="cuda"), torch.zeros(1000, 70, device="cuda")]

    assert traced_kernels(accumulate, arguments) == TracedKernels(2, [])


@pytest.mark.interpreter
def test_variable_makes_the_ops_launch_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from the public function through the dispatcher into the kernels, without a GPU."""
    by_reference, by_triton = tensors(), tensors()
    expected = step(*by_reference)
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setattr(factor_file, "accumulate_factor_reference", None)
    results = step(*by_triton)
    torch.testing.assert_close([by_triton, results], [by_reference, expected], rtol=1e-6, atol=1e-6)


def test_float64_takes_the_reference_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to take Triton on CPU, fp32 finds no driver; fp64 has no kernels and gives the reference's result."""
    wide, expected = (
        [t.double() if isinstance(t, Tensor) else [u.double() for u in t] for t in tensors()] for _ in "ab"
    )

    def step_in_float64(factor: Any, rows: Any, *lists: Any) -> list[Tensor]:
        accumulate_factor_(factor, rows, ones=True)
        momentum_update_(*lists)
        return unpack_symmetric(pack_symmetric([factor], torch.float64), [7], torch.float64)

    results = step_in_float64(*expected)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="active drivers"):
        step(*tensors())
    torch.testing.assert_close([step_in_float64(*wide), wide], [results, expected], rtol=0, atol=0)


def test_graphs_of_other_sources_have_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches on disk know an op by its name: the digest of our files is an argument of it."""
    keys: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        keys.extend(str(node.args[-1]) for node in graph.graph.nodes if "pack_symmetric" in str(node.target))
        return graph.forward

    for source in ("before", "after"):
        monkeypatch.setattr("triton_curv_kernels.choice._source", lambda source=source: source)
        torch._dynamo.reset()
        torch.compile(lambda m: pack_symmetric([m], torch.float32), backend=backend, fullgraph=True)(torch.eye(3))
    assert [key.partition(":")[0] for key in keys] == ["before", "after"]


def test_no_op_changes_an_argument_that_may_be_left_out() -> None:
    """Torch before 2.13 fails in every eager call without one."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("triton_curv::")]
    assert len(schemas) >= 12
    changed = [(s.name, a) for s in schemas for a in s.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert len(changed) >= 12
    assert [(name, a.name) for name, a in changed if a.has_default_value() or "Optional" in str(a.type)] == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_patch_factors_trace_with_a_batch_that_may_change(kernel_size: int, layout: torch.memory_format) -> None:
    def accumulate(factor: Tensor, images: Tensor) -> None:
        accumulate_patch_factor_(factor, images, kernel_size, padding=kernel_size // 2)

    def make() -> list[Tensor]:
        images = torch.empty(6, 16, 12, 12, device="cuda").to(memory_format=layout)
        maybe_mark_dynamic(images, 0)  # as torch marks what has had two sizes
        return [torch.empty(1, 16 * kernel_size**2, 16 * kernel_size**2, device="cuda"), images]

    traced = traced_kernels(accumulate, make)
    assert traced.inlined
    assert not traced.opaque
