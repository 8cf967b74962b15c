"""C <- beta C + alpha P^T P with the patches P that a convolution sees, never built: factor A of a convolution.

Shapes: input (samples, channels, *spatial) of 1 to 3 spatial dimensions, fp32, fp16 or bf16; factor (groups, n', n')
or, for one group, (n', n'), of fp32, dense and symmetric, with n = prod(kernel_size) * channels / groups columns,
kernel position first, channel last, and n' = n + 1 if `ones`: one more patch element that is always 1, the input that
belongs to a bias. The reference (patch_reference.py) takes fp64, too.
Source: KFC, arXiv 1602.01407 section 3.

As in factor.py, one program owns the pairs (i, j), (j, i) of its tile, and K is split through an fp32 workspace that
is added up in a fixed order by a second kernel, so that results do not vary from run to run.
"""

from collections.abc import Sequence
from math import prod

import torch
import triton
from torch import Tensor
from torch.library import custom_op, triton_op

from triton_curv_kernels.backend import UnsupportedInputError, on_own_device, use_reference, wrap_triton
from triton_curv_kernels.choice import choose_once, tables_key
from triton_curv_kernels.factor import INPUT_DTYPES
from triton_curv_kernels.patch_config import (
    CONFIGS,
    NUMERICS,
    PatchConfig,
    PatchProblem,
    beside_a_copy,
    config_in_place,
    default_config,
    prune,
    samples_of_part,
)
from triton_curv_kernels.patch_gather import _finish_gather_kernel, _gather_kernel
from triton_curv_kernels.patch_geometry import PaddingMode, PatchGeometry, padding_sides, per_dimension
from triton_curv_kernels.patch_padding import as_mode, padded_parts
from triton_curv_kernels.patch_pixel_rows import launch_pixels_, takes_pixels
from triton_curv_kernels.patch_products import _blocks_kernel, _products_kernel
from triton_curv_kernels.patch_reference import accumulate_patch_factor_reference

__all__ = [
    # the op, its reference and its launcher
    "accumulate_patch_factor_",
    "accumulate_patch_factor_reference",
    "launch_accumulate_patch_factor_",
    "supports",
    # its configurations
    "CONFIGS",
    "NUMERICS",
    "PatchConfig",
    "PatchProblem",
    "default_config",
    "prune",
]


def supports(factor: Tensor, input: Tensor) -> bool:
    """Whether the Triton path takes these dtypes: an fp32 factor of an fp32, fp16 or bf16 input.

    For others, fp64 say, the op takes the reference.
    """
    return factor.dtype == torch.float32 and input.dtype in INPUT_DTYPES


@on_own_device
def launch_accumulate_patch_factor_(
    factor: Tensor,
    input: Tensor,
    geometry: PatchGeometry,
    alpha: float = 1.0,
    beta: float = 1.0,
    ones: bool = False,
    config: PatchConfig | None = None,
) -> None:
    """`accumulate_patch_factor_` by Triton, whatever the device; factor (groups, n', n').

    Copy and workspace take at most 5 % of what the patches would. A kernel of one pixel reads any layout as it is.
    "implicit" and "displacement" read neighbouring channels: other layouts are copied, few samples at a time, or read
    in place (by default gathered), if one sample is too much or the input is small.
    """
    _check_shapes(factor, input, geometry, ones)
    if not supports(factor, input):
        raise UnsupportedInputError(
            f"expected an fp32 factor and an fp32, fp16 or bf16 input, got {factor.dtype} and {input.dtype}"
        )
    groups, per_group = factor.shape[0], input.shape[1] // factor.shape[0]
    if factor.numel() == 0:
        return
    reads_neighbours = input.stride(1) == 1 or per_group == 1
    if config is None and takes_pixels(input, geometry, groups):
        launch_pixels_(factor, input, geometry, alpha, beta, ones)
        return
    problem = PatchProblem.of(input, groups, geometry, ones)
    part = 0 if reads_neighbours else samples_of_part(problem)
    if config is None and part == 0 and not reads_neighbours:
        config = config_in_place(problem)
    elif config is None:
        call = (input.shape, input.stride(), input.dtype, input.device, groups, geometry, ones)
        config = choose_once("accumulate_patch_factor_", call, lambda: problem, default_config)
        config = beside_a_copy(config, problem) if part else config
    if config.algorithm == "displacement" and not geometry.shares_displacements:
        raise UnsupportedInputError(
            f"expected stride 1 and outputs at least as far as the kernel reaches for algorithm 'displacement', got "
            f"stride {geometry.stride}, outputs {geometry.outputs} and reach {geometry.gaps}"
        )
    if config.algorithm == "gather" or part == 0:
        _launch(factor, input, problem, alpha, beta, config)
        return
    for some in input.split(part):
        nearby = some.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
        _launch(factor, nearby, PatchProblem.of(nearby, groups, geometry, ones), alpha, beta, config)
        del nearby  # before the next is made
        beta = 1.0


def _launch(
    factor: Tensor, input: Tensor, problem: PatchProblem, alpha: float, beta: float, config: PatchConfig
) -> None:
    geometry, ones, block = problem.geometry, problem.ones, config.BLOCK_N
    groups, per_group, samples = problem.groups, problem.per_group, problem.samples
    if samples * max(geometry.positions, prod(geometry.sizes)) >= 2**31 - block:
        raise UnsupportedInputError(
            f"expected fewer than 2^31 pixels and output positions, got {samples} samples of {geometry.sizes}"
        )
    dims = len(geometry.kernel)
    shape = []
    for values, filler in (
        (geometry.sizes, 1),
        (geometry.outputs, 1),
        (geometry.kernel, 1),
        (geometry.stride, 1),
        (geometry.before, 0),
        (geometry.dilation, 1),
    ):
        shape += [filler] * (3 - dims) + list(values)
    strides = (*input.stride()[:2], *[0] * (3 - dims), *input.stride()[2:], *factor.stride())
    programs = config.programs(problem)
    splits = config.SPLIT_K
    steps = triton.cdiv(problem.rows, config.BLOCK_K)
    workspace = input.new_empty(config.workspace(problem), dtype=torch.float32) if splits > 1 else factor
    tiling = {"ONES": ones, "BLOCK_N": block, "num_warps": config.num_warps}
    products = {
        "BLOCK_K": config.BLOCK_K,
        "SPLIT": splits > 1,
        "INPUT_PRECISION": config.input_precision,
        "num_stages": config.num_stages,
    }
    part = (triton.cdiv(steps, splits), *shape, *strides)
    if config.algorithm == "gather":
        wrap_triton(_gather_kernel)[(programs, splits)](
            input, factor, workspace, samples, per_group, alpha, beta, *part, DIMS=dims, **tiling, **products
        )
        if splits > 1:
            finish = (problem.rows, problem.n, alpha, beta, splits, *factor.stride())
            wrap_triton(_finish_gather_kernel)[(programs,)](factor, workspace, *finish, **tiling)
        return
    displacement = config.algorithm == "displacement"
    wrap_triton(_products_kernel)[(programs, splits)](
        input,
        factor,
        workspace,
        samples,
        per_group,
        alpha,
        beta,
        *part,
        DISPLACEMENT=displacement,
        **tiling,
        **products,
    )
    if splits > 1 or displacement:
        tiles, positions = triton.cdiv(per_group, block), geometry.kernel_positions
        border = positions * tiles if ones and splits > 1 else 0
        blocks = groups * (positions * (positions + 1) // 2 * tiles**2 + border)
        wrap_triton(_blocks_kernel)[(blocks,)](
            input,
            factor,
            workspace,
            samples,
            per_group,
            alpha,
            beta if splits > 1 else 1.0,
            splits,
            programs,
            *shape,
            *strides,
            DISPLACEMENT=displacement,
            **tiling,
            **products,
        )


def _check_shapes(factor: Tensor, input: Tensor, geometry: PatchGeometry, ones: bool) -> None:
    groups = factor.shape[0] if factor.dim() == 3 else 0
    dims = len(geometry.kernel)
    if input.dim() != dims + 2 or groups == 0 or input.shape[1] % groups:
        raise UnsupportedInputError(
            f"expected an input (samples, channels, *spatial) of {dims} spatial dimensions and a factor "
            f"(groups, n', n') whose groups divide the channels, got input {tuple(input.shape)} and factor "
            f"{tuple(factor.shape)}"
        )
    n = geometry.kernel_positions * (input.shape[1] // groups) + ones
    if factor.shape[1:] != (n, n):
        raise UnsupportedInputError(
            f"expected a factor ({groups}, {n}, {n}) for {input.shape[1] // groups} channels a group, "
            f"{geometry.kernel_positions} kernel positions and {int(ones)} column of ones, got {tuple(factor.shape)}"
        )


@custom_op("triton_curv::accumulate_patch_factor_reference_", mutates_args={"factor"})
def _reference_op(
    factor: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    alpha: float,
    beta: float,
    ones: bool,
) -> None:
    """The reference as one node of a graph: it is many small calls."""
    geometry = PatchGeometry.of(input.shape[2:], kernel_size, stride, padding, dilation)
    accumulate_patch_factor_reference(factor, input, geometry, alpha, beta, ones)


def accumulate_padded_parts_(
    factor: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    padding_mode: PaddingMode,
    alpha: float,
    beta: float,
    ones: bool,
    config: PatchConfig | None = None,
) -> None:
    """`accumulate_patch_factor_` for an input that is padded by its own pixels, in parts; factor (groups, n', n')."""
    by_reference = use_reference(factor) or not supports(factor, input)
    for part in padded_parts(input, padding, padding_mode, kernel_size, stride, dilation):
        geometry = PatchGeometry.of(part.shape[2:], kernel_size, stride, [0] * len(padding), dilation)
        if by_reference:
            _check_shapes(factor, part, geometry, ones)
            accumulate_patch_factor_reference(factor, part, geometry, alpha, beta, ones)
        else:
            launch_accumulate_patch_factor_(factor, part, geometry, alpha, beta, ones, config)
        del part  # before the next is made
        beta = 1.0


@custom_op("triton_curv::accumulate_padded_patch_factor_", mutates_args={"factor"})
def _padded_op(
    factor: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    padding_mode: str,
    alpha: float,
    beta: float,
    ones: bool,
    config: list[int] | None,
    tables: str,
) -> None:
    """All parts as one node of a graph, which could not say that they are made one after another."""
    geometry = (kernel_size, stride, padding, dilation, as_mode(padding_mode))
    parsed = None if config is None else PatchConfig.from_ints(config)
    accumulate_padded_parts_(factor, input, *geometry, alpha, beta, ones, parsed)


@triton_op("triton_curv::accumulate_patch_factor_", mutates_args={"factor"})
def _accumulate_patch_factor_op(
    factor: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    alpha: float = 1.0,
    beta: float = 1.0,
    ones: bool = False,
    config: list[int] | None = None,
    tables: str = "",
) -> None:
    geometry = PatchGeometry.of(input.shape[2:], kernel_size, stride, padding, dilation)
    if use_reference(factor) or not supports(factor, input):
        _check_shapes(factor, input, geometry, ones)
        _reference_op(factor, input, kernel_size, stride, padding, dilation, alpha, beta, ones)
    else:
        parsed = None if config is None else PatchConfig.from_ints(config)
        launch_accumulate_patch_factor_(factor, input, geometry, alpha, beta, ones, parsed)


def accumulate_patch_factor_(
    factor: Tensor,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    ones: bool = False,
    alpha: float = 1.0,
    beta: float = 1.0,
    padding_mode: PaddingMode = "zeros",
    config: PatchConfig | None = None,
) -> None:
    """`factor.mul_(beta).add_(P.mT @ P, alpha=alpha)` with the patches P = unfold(input) of each group, never built.

    P has a row for each sample and output position of `torch.nn.Conv1d/2d/3d` with these arguments, and one more column
    of ones if `ones`. Its columns are ordered kernel position first, channel last.

    Args:
        factor: (groups, n', n'), or (n', n') for one group, n' = prod(kernel_size) * channels / groups, + 1 if `ones`;
            dense, symmetric, fp32 (fp64: by the reference).
        input: (samples, channels, *spatial), fp32, fp16 or bf16 (fp64: by the reference), any strides; no samples is
            fine. channels_last is read as it is, and any layout by a kernel of one pixel; others are copied in parts.
        kernel_size: the convolution's; its number of dimensions comes from the input.
        stride: the convolution's.
        padding: the convolution's, also 'same' and 'valid'.
        dilation: the convolution's.
        groups: the convolution's: one factor each.
        ones: take one more patch element into account that is always 1: the input that belongs to a bias.
        alpha: scale of the product.
        beta: scale of what is there; 0 ignores it, NaN included.
        padding_mode: of the convolution; for others than "zeros" the input is padded first, in parts of few samples, or
            of few output positions of one sample.
        config: algorithm and tiling of the Triton kernels; None means the tuner's choice, `default_config` without one.

    On a GPU it allocates at most 5 % of what `torch.nn.functional.unfold` would; a padded input is padded by one output
    position at a time at least. No gradient flows through it. Source: KFC, arXiv 1602.01407 section 3.

    Raises:
        UnsupportedInputError: shapes that do not fit, a kernel larger than the padded input, more padding than pixels.

    """
    input = input.detach()
    dims = input.dim() - 2
    kernel = per_dimension(kernel_size, dims, "kernel_size")
    steps, dilations = per_dimension(stride, dims, "stride"), per_dimension(dilation, dims, "dilation")
    sides = padding_sides(padding, kernel, dilations)
    if factor.dim() == 2:
        factor = factor[None]
    if factor.dim() != 3 or factor.shape[0] != groups:
        raise UnsupportedInputError(f"expected a factor of {groups} groups, got {tuple(factor.shape)}")
    ints = None if config is None else config.to_ints()
    if padding_mode != "zeros" and any(sides):
        numbers = (padding_mode, alpha, beta, ones)
        torch.ops.triton_curv.accumulate_padded_patch_factor_(
            factor, input, kernel, steps, sides, dilations, *numbers, ints, tables_key()
        )
        return
    if not torch.compiler.is_compiling() and use_reference(factor):
        geometry = PatchGeometry.of(input.shape[2:], kernel, steps, sides, dilations)
        _check_shapes(factor, input, geometry, ones)
        accumulate_patch_factor_reference(factor, input, geometry, alpha, beta, ones)
    else:
        torch.ops.triton_curv.accumulate_patch_factor_(
            factor, input, kernel, steps, sides, dilations, alpha, beta, ones, ints, tables_key()
        )
