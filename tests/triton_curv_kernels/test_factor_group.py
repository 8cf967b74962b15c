"""`accumulate_factors_`: kernels in the interpreter and the CPU reference, against products in float64; its plans."""

from collections import Counter
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.offline import TracedKernels, traced_kernels
from tests.support.poison import poisoned, poisoned_allocations
from triton_curv_kernels import factor_group
from triton_curv_kernels.backend import DeviceLimits, UnsupportedInputError
from triton_curv_kernels.device_cache import DeviceCache
from triton_curv_kernels.factor_group import accumulate_factors_, launch_accumulate_factors_
from triton_curv_kernels.factor_group_config import (
    GROUP_CONFIGS,
    GROUP_NUMERICS,
    GroupConfig,
    GroupProblem,
    default_group_config,
    prune_group,
)
from triton_curv_kernels.factor_table import Kind, MatrixShape, plan
from triton_curv_kernels.packed import from_dense, packed_length, to_dense

SPLIT = GroupConfig(BLOCK_N=32, SMALL_N=16, BLOCK_K=16, PART_K=32, num_warps=4, num_stages=2)
WHOLE = replace(SPLIT, PART_K=1024)
# aligned and not, small and large tiles, no rows, no columns, one element, a batch
SHAPES = [(40, 8), (70, 37), (0, 5), (3, 0), (2, 50, 24), (1, 1), (100, 32), (33, 64)]
MATRICES = 9
ALPHAS = [0.5, 1.0, 2.0, 1.0, 0.25, 1.0, 0.5, 1.0]
BETAS = [0.0, 1.0, 0.5, 0.25, 0.0, 1.0, 0.5, 0.0]

Lists = tuple[list[Tensor], list[Tensor], list[bool]]


def integers(shape: tuple[int, ...]) -> Tensor:
    """Small whole numbers: every sum of products is exact in fp32."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def lists(form: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,), places: slice = slice(None)) -> Lists:
    """Factors ("dense", "packed" or "mixed"), rows and ones; a factor that is ignored holds NaN."""
    factors, rows, ones = [], [], []
    for place, shape in enumerate(SHAPES):
        rows.append(integers(shape).to(dtypes[place % len(dtypes)]))
        ones.append(place % 3 != 0)
        size = shape[-1] + ones[-1]
        half = integers((*shape[:-2], size, size))
        factor = poisoned(half.shape) if BETAS[place] == 0 else half + half.mT
        factors.append(from_dense(factor) if form == "packed" or (form == "mixed" and place % 2) else factor)
    return factors[places], rows[places], ones[places]


def dense(factor: Tensor, rows: Tensor) -> Tensor:
    return to_dense(factor) if factor.dim() < rows.dim() else factor


def expected(factor: Tensor, rows: Tensor, alpha: float, beta: float, ones: bool) -> Tensor:
    """The definition, in float64."""
    x = rows.double()
    if ones:
        x = torch.cat([x, x.new_ones((*x.shape[:-1], 1))], dim=-1)
    old = dense(factor, rows).double() * beta if beta else 0.0
    return old + alpha * (x.mT @ x)


def launching(config: GroupConfig | None) -> Any:
    def launch(
        factors: Any, rows: Any, alphas: Any, betas: Any, ones: Any, traces: Any = None, bad: Any = None
    ) -> None:
        alphas, betas = torch.tensor(alphas), torch.tensor(betas)
        launch_accumulate_factors_(factors, rows, alphas, betas, ones, traces, bad, config)

    return launch


ways = pytest.mark.parametrize(
    "accumulate",
    [
        pytest.param(accumulate_factors_, id="reference"),
        pytest.param(launching(SPLIT), id="split", marks=pytest.mark.interpreter),
        pytest.param(launching(WHOLE), id="whole", marks=pytest.mark.interpreter),
    ],
)


@ways
@pytest.mark.parametrize("form", ["dense", "packed", "mixed"])
def test_is_exact(accumulate: Any, form: str) -> None:
    """And symmetric bit by bit, with traces and counts; the launches write every element."""
    factors, rows, ones = lists(form, (torch.float32, torch.bfloat16, torch.float16))
    targets = [expected(*each) for each in zip(factors, rows, ALPHAS, BETAS, ones, strict=True)]
    traces, nonfinite = poisoned((MATRICES,)), torch.full((MATRICES,), -7, dtype=torch.int32)
    with poisoned_allocations():
        accumulate(factors, rows, ALPHAS, BETAS, ones, traces, nonfinite)
    for factor, x, target in zip(factors, rows, targets, strict=True):
        result = dense(factor, x)
        torch.testing.assert_close(result.double(), target, rtol=0, atol=0)
        assert torch.equal(result, result.mT)
    diagonals = torch.cat([t.diagonal(0, -2, -1).sum(-1).reshape(-1) for t in targets])
    torch.testing.assert_close(traces.double(), diagonals, rtol=0, atol=0)
    assert not nonfinite.any()


@ways
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_counts_what_is_not_finite(accumulate: Any, form: str) -> None:
    """Two columns with NaN and Inf in one layer, an old factor with one NaN on its diagonal in another."""
    factors, rows, ones = lists(form)
    rows[1][3, 5], rows[1][40, 20] = float("nan"), float("inf")
    corner = factors[2][-1, -1] if form == "dense" else factors[2][-1:]
    corner.fill_(float("nan"))
    nonfinite = torch.empty(MATRICES, dtype=torch.int32)
    accumulate(factors, rows, ALPHAS, BETAS, ones, None, nonfinite)
    assert nonfinite.tolist() == [0, 2, 1 if form == "dense" else 0, 0, 0, 0, 0, 0, 0]
    assert not dense(factors[1], rows[1])[5].isfinite().any()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT.contiguous().mT,  # column-major
        lambda x: torch.cat([x, -x], dim=-1)[..., : x.shape[-1]],  # gaps between rows
        lambda x: torch.cat([x[..., :1], x], dim=-1)[..., 1:],  # not at a multiple of 16 bytes
        lambda x: x[..., :1, :].expand_as(x),
    ],
    ids=["transposed", "strided", "offset", "expanded"],
)
def test_launch_takes_any_strides(view: Any) -> None:
    factors, rows, ones = lists("mixed", places=slice(6))
    rows = [view(x) if x.numel() else x for x in rows]
    alphas, betas = ALPHAS[:6], BETAS[:6]
    targets = [expected(*each) for each in zip(factors, rows, alphas, betas, ones, strict=True)]
    launching(SPLIT)(factors, rows, alphas, betas, ones)
    for factor, x, target in zip(factors, rows, targets, strict=True):
        assert torch.equal(dense(factor, x).double(), target)


@pytest.mark.interpreter
def test_second_call_equals_the_first_and_stale_addresses_are_impossible() -> None:
    """The same addresses with other shapes, then the first again: tables are keyed by all that they hold."""
    memory = torch.randn(100 * 40, generator=torch.Generator().manual_seed(0))

    def result(k: int, n: int) -> Tensor:
        factor = poisoned((n, n))
        launching(SPLIT)([factor], [memory[: k * n].view(k, n)], [1.0], [0.0], [False])
        torch.testing.assert_close(factor, memory[: k * n].view(k, n).mT @ memory[: k * n].view(k, n))
        return factor

    first = result(100, 40)
    result(80, 25)
    assert torch.equal(result(100, 40), first)


@pytest.mark.interpreter
def test_list_takes_one_pair_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: dict[str, list[Any]] = {"multiply_group_kernel": [], "finish_group_kernel": []}

    class Counting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(factor_group, name)

        def __getitem__(self, grid: Any) -> Any:
            grids[self.name].append(grid)
            return self.kernel[grid]

    for name in grids:
        monkeypatch.setattr(factor_group, name, Counting(name))
    factors, rows, ones = lists("mixed")
    launching(SPLIT)(factors, rows, ALPHAS, BETAS, ones)
    assert [len(x) for x in grids.values()] == [1, 1]
    launching(WHOLE)(factors, rows, ALPHAS, BETAS, ones, None, None)  # nothing is left to finish
    assert [len(x) for x in grids.values()] == [2, 1]
    factors, rows, ones = lists("mixed", (torch.float32, torch.bfloat16))
    launching(SPLIT)(factors, rows, ALPHAS, BETAS, ones)
    assert [len(x) for x in grids.values()] == [4, 3]


def test_numbers_may_be_one_or_a_tensor() -> None:
    results = []
    for alphas in (0.5, [0.5] * len(SHAPES), torch.full((len(SHAPES),), 0.5)):
        factors, rows, _ = lists("dense")
        factors = [torch.zeros(*x.shape[:-2], x.shape[-1], x.shape[-1]) for x in rows]
        accumulate_factors_(factors, rows, alphas)
        results.append(factors)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.interpreter
def test_numbers_may_have_gaps_and_any_dtype() -> None:
    """One number spread over all factors by `expand`, and float64."""
    results = []
    for alphas in (torch.full((3,), 0.5), torch.tensor(0.5).expand(3), torch.full((3, 2), 0.5).double()[:, 0]):
        rows = [integers((9, n)) for n in (3, 17, 5)]
        factors = [torch.zeros(x.shape[1], x.shape[1]) for x in rows]
        launch_accumulate_factors_(factors, rows, alphas, torch.zeros(3), [False] * 3, config=SPLIT)
        results.append(factors)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[0][1], 0.5 * rows[1].mT @ rows[1])


def test_bad_input_is_named() -> None:
    with pytest.raises(UnsupportedInputError, match=r"expected alphas \(1,\), got \(\)"):
        accumulate_factors_([torch.zeros(3, 3)], [torch.ones(5, 3)], torch.tensor(1.0))
    with pytest.raises(UnsupportedInputError, match="one device"):
        launch_accumulate_factors_(
            [torch.zeros(3, 3)], [torch.ones(5, 3)], torch.ones(1, device="meta"), torch.ones(1), [False]
        )
    factor, rows = torch.zeros(3, 3), torch.ones(5, 3)
    for accumulate in (accumulate_factors_, partial(launching(SPLIT), alphas=[1.0], betas=[1.0], ones=[False])):
        with pytest.raises(UnsupportedInputError, match="place 0: expected rows"):
            accumulate(factors=[factor[:2]], rows=[rows])
        with pytest.raises(UnsupportedInputError, match="as many factors"):
            accumulate(factors=[factor], rows=[rows, rows])
        with pytest.raises(UnsupportedInputError, match=r"expected traces \(1,\) of torch.float32"):
            accumulate(factors=[factor], rows=[rows], traces=torch.zeros(2))
    with pytest.raises(UnsupportedInputError, match="each factor once"):
        accumulate_factors_([factor, factor], [rows, rows])
    with pytest.raises(UnsupportedInputError, match="one device"):
        accumulate_factors_([factor], [rows.to("meta")])
    with pytest.raises(UnsupportedInputError, match=r"at place 0, got torch.float64"):
        launching(SPLIT)([factor.double()], [rows], [1.0], [1.0], [False])
    accumulate_factors_([], [])


def test_opcheck() -> None:
    factors, rows, ones = lists("mixed")
    alphas, betas = torch.tensor(ALPHAS), torch.tensor(BETAS)
    factors = [torch.nan_to_num(factor) for factor in factors]
    outputs = [torch.zeros(MATRICES), torch.zeros(MATRICES, dtype=torch.int32)]
    torch.library.opcheck(
        torch.ops.triton_curv.accumulate_factors_, (factors, rows, alphas, betas, ones, outputs, SPLIT.to_ints())
    )


@pytest.mark.parametrize("wanted", [(), ("traces",), ("nonfinite",)], ids=str)
def test_the_op_itself_without_some_statistics(wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every eager call goes through torch's dispatcher; here only what asks for it does."""
    factors, rows, ones = lists("mixed")
    expected = [factor.clone() for factor in factors]
    outputs = {"traces": torch.zeros(MATRICES), "nonfinite": torch.full((MATRICES,), 7, dtype=torch.int32)}
    same = {name: output.clone() for name, output in outputs.items()}
    traces, nonfinite = (same[name] if name in wanted else None for name in same)
    accumulate_factors_(expected, rows, ALPHAS, BETAS, ones, traces, nonfinite)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # no short cut to the reference
    traces, nonfinite = (outputs[name] if name in wanted else None for name in outputs)
    accumulate_factors_(factors, rows, ALPHAS, BETAS, ones, traces, nonfinite)
    torch.testing.assert_close([factors, outputs], [expected, same], equal_nan=True)


def step(first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    traces = torch.empty(2, device=rows.device)
    accumulate_factors_([first, second], [rows, rows * 2], 0.5, [0.0, 1.0], [True, False], traces)
    return traces + first.sum()


def arguments(device: str = "cpu") -> list[Tensor]:
    factors = [torch.zeros(5, 5, device=device), torch.ones(packed_length(4), device=device)]
    return [*factors, torch.arange(24.0, device=device).view(6, 4)]


def test_graph_of_cuda_tensors_keeps_the_op_whole() -> None:
    """A trace has no addresses: one graph, no launches in it, one opaque op that makes a pair of them when it runs."""
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if "triton_curv" in str(node.target))
        return graph.forward

    assert traced_kernels(step, lambda: arguments("cuda")) == TracedKernels(0, [])
    torch._dynamo.reset()
    torch.compile(step, backend=backend, fullgraph=True)(*arguments())
    assert names == ["triton_curv.accumulate_factors_"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_cpu_graph_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled = arguments(), arguments()
    expected_traces = step(*eager)
    traces = torch.compile(step, backend=backend, fullgraph=True)(*compiled)
    torch.testing.assert_close([traces, *compiled], [expected_traces, *eager])


def matrix(k: int, n: int, ones: bool = False, wide: bool = True, place: int = 0) -> MatrixShape:
    return MatrixShape(place, k, n, ones, False, wide, n, 1, n, 1, place)


@pytest.mark.parametrize("config", [SPLIT, WHOLE], ids=["split", "whole"])
def test_plan_covers_every_tile_and_row_once(config: GroupConfig) -> None:
    matrices = tuple(matrix(k, n, bool(n % 2), n % 8 == 0, m) for m, (k, n) in enumerate([(100, 40), (7, 65), (0, 9)]))
    work = plan(matrices, torch.float32, config, statistics=False)
    for m, shape in enumerate(matrices):
        tiles = work.items[(work.items[:, 1] == m) & (work.items[:, 0] < Kind.BORDER)]
        block = config.BLOCK_N if (tiles[:, 0] == Kind.LARGE).all() else config.SMALL_N
        covered = np.zeros((-(-shape.n // block),) * 2 + (shape.k,), dtype=int)
        for _, _, row, column, first, count, *_ in tiles:
            covered[row, column, first : first + count] += 1
        assert (covered == np.tri(len(covered), dtype=int)[:, :, None]).all()
        assert len(np.unique(tiles[:, 6])) == (len(tiles) if work.splits else 1)
    lengths = work.items[:, 5][work.items[:, 1] == 0]
    assert sorted(set(lengths)) == ([4, 32] if config is SPLIT else [100])


def test_plan_has_tiles_of_all_kinds() -> None:
    matrices = (matrix(100, 32, True), matrix(9, 8), matrix(9, 37, True, wide=False))
    work = plan(matrices, torch.bfloat16, SPLIT, statistics=True)
    assert work.kinds == Kind.LARGE | Kind.SMALL | Kind.STRIDED | Kind.BORDER | Kind.STRIDED_BORDER
    assert work.finish_kinds & Kind.STATISTICS
    assert Counter(work.finish[:, 0])[Kind.STATISTICS] == 3


def test_device_cache_is_bounded_and_keeps_what_is_used() -> None:
    cache, made = DeviceCache(2), []

    def get(key: int) -> Tensor:
        def make() -> Any:
            made.append(key)
            return [np.array([key], dtype=np.int64)]

        return cache.get(key, torch.device("cpu"), make)[0]

    assert [int(get(key)) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]
    assert len(cache) == 2


def test_config_goes_through_integers() -> None:
    for config in GROUP_CONFIGS[::7]:
        assert GroupConfig.from_ints(config.to_ints()) == config
    assert set(GROUP_NUMERICS) <= {field.name for field in fields(GroupConfig)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limits", [DeviceLimits(), DeviceLimits("hip", 304, 64 * 1024)], ids=lambda x: x.platform)
@pytest.mark.parametrize("shapes", [((64, 1),), ((8192, 768), (8192, 3072)), ((3_000_000, 147), (1568, 4608))], ids=str)
def test_default_is_one_of_the_pruned_configs(shapes: Any, limits: DeviceLimits, dtype: torch.dtype) -> None:
    problem = GroupProblem(GroupProblem.count(shapes), dtype, limits)
    assert default_group_config(problem) in prune_group(GROUP_CONFIGS, problem)
