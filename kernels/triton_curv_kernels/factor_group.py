"""C_l <- beta_l C_l + alpha_l X_l^T X_l for the factors of a whole list of layers, in one pair of launches.

Shapes: as `accumulate_factor_`, for each place of the lists: rows (K, n) or (B, K, n) of fp32, fp16 or bf16 and any
strides, factors dense or packed, fp32. `alphas` and `betas` (L,) lie on the device, so that new values need neither a
copy nor a new CUDA graph. Also on the way: the trace of each new factor and how many numbers on its diagonal are not
finite. (If a column of X holds NaN or Inf, C_ii is not finite; if all C_ii are finite, so is every
|C_ij| <= sqrt(C_ii C_jj).)
Source: A and G of arXiv 1811.12019 section 3.

Programs are rows of a table that the host plans once for a list of shapes (factor_table.py): a tile of the lower
triangle of one factor and a part of its K, all of like length, longest first. Parts go through an fp32 workspace and a
second kernel, which adds them in their order (if no K is cut, factors are written at once). No atomics: results do not
vary from run to run.

The table holds addresses, which tensors have none of while torch.compile traces: the op is a
`torch.library.custom_op`, one node that no compiler looks into, and still one pair of launches when the graph runs.
(`accumulate_factor_`, one layer at a time, is the one that is traced down to its kernels.)
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from triton_curv_kernels.backend import (
    UnsupportedInputError,
    device_limits,
    on_own_device,
    use_reference,
)
from triton_curv_kernels.choice import choose_once
from triton_curv_kernels.device_cache import DeviceCache
from triton_curv_kernels.factor import check_shapes, compiled_precision, supports
from triton_curv_kernels.factor_group_config import GroupConfig, GroupProblem, default_group_config
from triton_curv_kernels.factor_group_kernels import finish_group_kernel, multiply_group_kernel
from triton_curv_kernels.factor_reference import accumulate_factor_reference
from triton_curv_kernels.factor_table import BORDER_N, WIDEST_STRIP, AddressedMatrix, MatrixShape, matrices_of, plan
from triton_curv_kernels.packed import packed_diagonal

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
STATISTICS_BLOCK = 1024

_tables = DeviceCache(128)

Numbers = float | Sequence[float] | Tensor


def accumulate_factors_reference(
    factors: Sequence[Tensor],
    rows: Sequence[Tensor],
    alphas: Sequence[float],
    betas: Sequence[float],
    ones: Sequence[bool],
    traces: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """`accumulate_factor_reference` one after another; then sums over the diagonals."""
    for factor, x, alpha, beta, one in zip(factors, rows, alphas, betas, ones, strict=True):
        accumulate_factor_reference(factor, x, alpha, beta, one)
    if traces is None and nonfinite is None:
        return
    diagonals = [_diagonal(*each) for each in zip(factors, rows, ones, strict=True)]
    if traces is not None and traces.numel():
        torch.cat([d.sum(-1).reshape(-1) for d in diagonals], out=traces)
    if nonfinite is not None and nonfinite.numel():
        nonfinite.copy_(torch.cat([(~d.isfinite()).sum(-1).reshape(-1) for d in diagonals]))


def _diagonal(factor: Tensor, rows: Tensor, ones: bool) -> Tensor:
    packed = factor.dim() < rows.dim()
    return torch.cat(packed_diagonal(factor, rows.shape[-1] + int(ones)), -1) if packed else factor.diagonal(0, -2, -1)


@on_own_device
def launch_accumulate_factors_(
    factors: Sequence[Tensor],
    rows: Sequence[Tensor],
    alphas: Tensor,
    betas: Tensor,
    ones: Sequence[bool],
    traces: Tensor | None = None,
    nonfinite: Tensor | None = None,
    config: GroupConfig | None = None,
) -> None:
    """`accumulate_factors_` by Triton, whatever the device: one pair of launches for each dtype of rows.

    The second is left out if no K is cut and no statistics are wanted.
    """
    check_lists(factors, rows, alphas, betas, ones, traces, nonfinite)
    for index, (factor, x) in enumerate(zip(factors, rows, strict=True)):
        if not supports(factor, x):
            raise UnsupportedInputError(
                f"expected an fp32 factor and fp32, fp16 or bf16 rows at place {index}, got {factor.dtype} and "
                f"{x.dtype}"
            )
    alphas, betas = (numbers.to(torch.float32).contiguous() for numbers in (alphas, betas))
    traces, nonfinite = _both(traces, nonfinite) or (None, None)
    place = 0
    by_dtype: dict[torch.dtype, list[AddressedMatrix]] = {}
    for entry, (factor, x, one) in enumerate(zip(factors, rows, ones, strict=True)):
        matrices = matrices_of(entry, place, factor, x, one)
        by_dtype.setdefault(x.dtype, []).extend(matrices)
        place += len(matrices)
    for dtype, matrices in by_dtype.items():
        _launch(matrices, dtype, alphas, betas, traces, nonfinite, config)


def _launch(
    matrices: Sequence[AddressedMatrix],
    dtype: torch.dtype,
    alphas: Tensor,
    betas: Tensor,
    traces: Tensor | None,
    nonfinite: Tensor | None,
    config: GroupConfig | None,
) -> None:
    """One pair of launches."""
    if not matrices:
        return
    device = alphas.device
    shapes = tuple(matrix.shape for matrix in matrices)
    if config is None:
        config = choose_once(
            "accumulate_factors_",
            (shapes, dtype, device),
            lambda: group_problem(shapes, dtype, device),
            default_group_config,
        )
    work = plan(shapes, dtype, config, traces is not None)
    planned = (shapes, dtype, config, traces is not None)
    on_shapes, items, finish = _tables.get(planned, device, lambda: (work.shapes, work.items, work.finish))
    at = tuple((matrix.rows, matrix.factor) for matrix in matrices)
    (addresses,) = _tables.get(at, device, lambda: (np.array(at, dtype=np.int64),))
    workspace = torch.empty(max(1, work.workspace), dtype=torch.float32, device=device)
    packed = {shape.packed for shape in shapes}
    options = {
        "PACKED": "some" if len(packed) > 1 else "all" if packed.pop() else "none",
        "BLOCK_N": config.BLOCK_N,
        "SMALL_N": config.SMALL_N,
        "BORDER_N": BORDER_N,
        "num_warps": config.num_warps,
    }
    if len(work.items):
        multiply_group_kernel[(len(work.items),)](
            *(addresses, on_shapes, items, alphas, betas, workspace),
            **options,
            ROWS_DTYPE=TRITON_DTYPES[dtype],
            KINDS=work.kinds,
            SPLITS=work.splits,
            STATISTICS=traces is not None,
            ALIGN=16 // dtype.itemsize,
            BLOCK_K=config.BLOCK_K,
            INPUT_PRECISION=compiled_precision(config.input_precision),
            num_stages=config.num_stages,
        )
    if len(work.finish):
        statistics = (traces, nonfinite) if traces is not None else (workspace, workspace)
        finish_group_kernel[(len(work.finish),)](
            *(addresses, on_shapes, finish, alphas, betas, workspace, *statistics),
            **options,
            KINDS=work.finish_kinds,
            STRIP=WIDEST_STRIP,
            STATISTICS_BLOCK=STATISTICS_BLOCK,
        )


def group_problem(matrices: Sequence[MatrixShape], dtype: torch.dtype, device: torch.device) -> GroupProblem:
    """Describe a launch over `matrices`; their order does not matter."""
    return GroupProblem(
        shapes=GroupProblem.count((m.k, m.n) for m in matrices),
        dtype=dtype,
        limits=device_limits(device),
        ones=any(m.ones for m in matrices),
        packed=any(m.packed for m in matrices),
        aligned=all(m.wide for m in matrices),
    )


def check_lists(
    factors: Sequence[Tensor],
    rows: Sequence[Tensor],
    alphas: Tensor | Sequence[float],
    betas: Tensor | Sequence[float],
    ones: Sequence[bool],
    traces: Tensor | None,
    nonfinite: Tensor | None,
) -> None:
    """Raise UnsupportedInputError unless the lists fit together and no two factors are one."""
    _check_numbers(alphas, betas, len(factors))
    lengths = [len(x) for x in (factors, rows, alphas, betas, ones)]
    if len(set(lengths)) > 1:
        raise UnsupportedInputError(
            "expected as many factors, rows, alphas, betas and ones, got {}, {}, {}, {}, {}".format(*lengths)
        )
    for index, (factor, x, one) in enumerate(zip(factors, rows, ones, strict=True)):
        try:
            check_shapes(factor, x, one)
        except UnsupportedInputError as error:
            raise UnsupportedInputError(f"place {index}: {error}") from None
    numbers = [x for x in (alphas, betas) if isinstance(x, Tensor)]
    devices = {str(tensor.device) for tensor in (*factors, *rows, *numbers)}
    if len(devices) > 1:
        raise UnsupportedInputError(f"expected all tensors on one device, got {sorted(devices)}")
    known = [factor.data_ptr() for factor in factors if factor.numel() and factor.device.type != "meta"]
    if len(set(known)) < len(known):
        raise UnsupportedInputError(
            "expected each factor once, got one at several places: their programs would write it at the same time"
        )
    matrices = sum(x.shape[0] if x.dim() == 3 else 1 for x in rows)
    for name, output, dtype in (("traces", traces, torch.float32), ("nonfinite", nonfinite, torch.int32)):
        if output is not None and (output.shape != (matrices,) or output.dtype != dtype or not output.is_contiguous()):
            raise UnsupportedInputError(
                f"expected {name} ({matrices},) of {dtype}, one for each matrix, got {tuple(output.shape)} of "
                f"{output.dtype}"
            )


def _check_numbers(alphas: Numbers, betas: Numbers, count: int) -> None:
    for name, given in (("alphas", alphas), ("betas", betas)):
        if isinstance(given, Tensor) and given.dim() != 1:
            raise UnsupportedInputError(f"expected {name} ({count},), got {tuple(given.shape)}")


# Its tables stay in memory between calls, which the private memory pools of inductor's CUDA graphs do not allow.
# `statistics` is [traces, nonfinite] or []: torch before 2.13 fails for mutated arguments that are None.
@custom_op(
    "triton_curv::accumulate_factors_",
    mutates_args={"factors", "statistics"},
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _accumulate_factors_op(
    factors: list[Tensor],
    rows: list[Tensor],
    alphas: Tensor,
    betas: Tensor,
    ones: list[bool],
    statistics: list[Tensor],
    config: list[int] | None = None,
) -> None:
    if not factors:
        return
    traces, nonfinite = statistics or (None, None)
    if use_reference(factors[0]) or not all(map(supports, factors, rows)):
        check_lists(factors, rows, alphas, betas, ones, traces, nonfinite)
        accumulate_factors_reference(factors, rows, alphas.tolist(), betas.tolist(), ones, traces, nonfinite)
    else:
        parsed = None if config is None else GroupConfig.from_ints(config)
        launch_accumulate_factors_(factors, rows, alphas, betas, ones, traces, nonfinite, parsed)


def accumulate_factors_(
    factors: Sequence[Tensor],
    rows: Sequence[Tensor],
    alphas: Numbers = 1.0,
    betas: Numbers = 1.0,
    ones: bool | Sequence[bool] = False,
    traces: Tensor | None = None,
    nonfinite: Tensor | None = None,
    config: GroupConfig | None = None,
) -> None:
    """`for each layer: accumulate_factor_(factor, rows, alpha, beta, ones)`, in one pair of launches.

    Args:
        factors: dense or packed, as `accumulate_factor_` takes them, each once; mixed as you like.
        rows: (K, n) or (B, K, n), one for each factor; dtypes may be mixed, each takes a pair of launches.
        alphas: scales of the products: one number, one for each factor, or a tensor (L,) of fp32 on the device.
        betas: scales of what is there, likewise; 0 ignores it, NaN included.
        ones: take one more column into account, of ones: for all or for each factor.
        traces: (M,) fp32, written: trace of each new factor; M counts the matrices of batches.
        nonfinite: (M,) int32, written: how many numbers on its diagonal are NaN or infinite.
        config: tiling of the Triton kernels; None means the tuner's choice, `default_group_config` without one.

    No gradient flows through it. Under torch.compile it stays one opaque node. On CPU, and for dtypes that Triton does
    not take, it is a loop over the reference, which reads `alphas` and `betas`. Two calls with the same addresses (a
    CUDA graph, or activations that the allocator puts in the same place) copy nothing to the device.
    Source: factors A and G of arXiv 1811.12019 section 3.

    Raises:
        UnsupportedInputError: lists or shapes that do not fit, a factor that comes twice, several devices.

    """
    count = len(factors)
    if count == 0:
        return
    _check_numbers(alphas, betas, count)
    each_ones = [ones] * count if isinstance(ones, bool) else list(ones)
    rows = [x.detach() for x in rows]
    device = factors[0].device
    if not torch.compiler.is_compiling() and use_reference(factors[0]):
        numbers = (_as_list(alphas, count), _as_list(betas, count))
        check_lists(factors, rows, *numbers, each_ones, traces, nonfinite)
        accumulate_factors_reference(factors, rows, *numbers, each_ones, traces, nonfinite)
    else:
        vectors = (_as_tensor(alphas, count, device), _as_tensor(betas, count, device))
        ints = None if config is None else config.to_ints()
        statistics = _both(traces, nonfinite)
        torch.ops.triton_curv.accumulate_factors_(factors, rows, *vectors, each_ones, statistics, ints)


def _both(traces: Tensor | None, nonfinite: Tensor | None) -> list[Tensor]:
    """The two outputs of the kernels, one made where only the other is wanted; none where neither is."""
    if traces is not None:
        return [traces, torch.empty_like(traces, dtype=torch.int32) if nonfinite is None else nonfinite]
    return [] if nonfinite is None else [torch.empty_like(nonfinite, dtype=torch.float32), nonfinite]


def _as_list(numbers: Numbers, count: int) -> list[float]:
    if isinstance(numbers, Tensor):
        values: list[float] = numbers.tolist()
        return values
    return [numbers] * count if isinstance(numbers, (int, float)) else list(numbers)


def _as_tensor(numbers: Numbers, count: int, device: torch.device) -> Tensor:
    if isinstance(numbers, Tensor):
        return numbers
    if isinstance(numbers, (int, float)):
        return torch.full((count,), numbers, dtype=torch.float32, device=device)
    host = torch.tensor(numbers, dtype=torch.float32)
    return (host.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else host).to(
        device, non_blocking=True
    )
