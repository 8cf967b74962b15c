"""Triangles and buffers: `pack_symmetric`, `unpack_symmetric`."""

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from triton_curv_autotune.registry import Inputs, Op, power_of_two, register
from triton_curv_kernels import packed as packed_format
from triton_curv_kernels import symmetric as kernel
from triton_curv_kernels import symmetric_config
from triton_curv_kernels.packed import packed_length
from triton_curv_kernels.symmetric import SymmetricConfig, SymmetricProblem


def bucket(problem: SymmetricProblem) -> SymmetricProblem:
    """Rows and numbers in all down to powers of two."""
    return replace(problem, n=power_of_two(problem.n), numel=power_of_two(problem.numel))


def _sizes(problem: SymmetricProblem) -> list[int]:
    return [problem.n] * max(1, problem.numel // max(1, packed_length(problem.n)))


def pack_inputs(problem: SymmetricProblem, device: torch.device) -> Inputs:
    """(matrices, dtype, scale)."""
    generator = torch.Generator(device).manual_seed(0)
    halves = [torch.randn((n, n), device=device, generator=generator) for n in _sizes(problem)]
    return [(half + half.mT).to(problem.dtype) for half in halves], problem.packed_dtype, 0.5


def unpack_inputs(problem: SymmetricProblem, device: torch.device) -> Inputs:
    """(packed, sizes, dtype, scale)."""
    generator, sizes = torch.Generator(device).manual_seed(0), _sizes(problem)
    packed = torch.randn(packed_length(problem.n) * len(sizes), device=device, generator=generator)
    return packed.to(problem.packed_dtype), sizes, problem.dtype, 0.5


def pack_launch(inputs: Inputs, config: SymmetricConfig) -> list[Tensor]:
    """The Triton path; the buffer is the result."""
    matrices, dtype, scale = inputs
    return [kernel.launch_pack_symmetric(matrices, dtype, scale, config)]


def unpack_launch(inputs: Inputs, config: SymmetricConfig) -> list[Tensor]:
    """The Triton path; the matrices are the results."""
    packed, sizes, dtype, scale = inputs
    return kernel.launch_unpack_symmetric(packed, sizes, dtype, scale, config)


def _wide(given: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """float64 for what comes in float64: the oracle does not round."""
    return given if given == torch.float64 else dtype


def pack_reference(inputs: Inputs) -> list[Tensor]:
    """Plain torch."""
    matrices, dtype, scale = inputs
    return [kernel.pack_symmetric_reference(matrices, _wide(matrices[0].dtype, dtype), scale)]


def unpack_reference(inputs: Inputs) -> list[Tensor]:
    """Plain torch."""
    packed, sizes, dtype, scale = inputs
    return kernel.unpack_symmetric_reference(packed, sizes, _wide(packed.dtype, dtype), scale)


def pack_describe(inputs: Inputs) -> list[tuple[str, Any]]:
    """The one problem of a call."""
    matrices, dtype = inputs[:2]
    sizes = [matrix.shape[0] for matrix in matrices]
    return [("pack_symmetric", kernel.symmetric_problem(sizes, matrices[0].dtype, dtype, matrices[0].device))]


def unpack_describe(inputs: Inputs) -> list[tuple[str, Any]]:
    """The one problem of a call."""
    packed, sizes, dtype = inputs[:3]
    return [("unpack_symmetric", kernel.symmetric_problem(sizes, dtype, packed.dtype, packed.device))]


EXAMPLES = tuple(
    SymmetricProblem(n, numel, torch.float32, packed_dtype)
    for (n, numel), packed_dtype in product(
        ((64, 1 << 16), (256, 1 << 20), (1024, 1 << 24), (4096, 1 << 26)), (torch.float32, torch.bfloat16)
    )
)

PACK_SYMMETRIC, UNPACK_SYMMETRIC = (
    register(
        Op(
            name=name,
            problem=SymmetricProblem,
            config=SymmetricConfig,
            configs=kernel.CONFIGS,
            prune=kernel.prune,
            default=kernel.default_config,
            bucket=bucket,
            numerics=kernel.NUMERICS,
            modules=(kernel, symmetric_config, packed_format),
            make_inputs=make_inputs,
            launch=launch,
            reference=reference,
            describe=describe,
            examples=EXAMPLES,
        )
    )
    for name, make_inputs, launch, reference, describe in (
        ("pack_symmetric", pack_inputs, pack_launch, pack_reference, pack_describe),
        ("unpack_symmetric", unpack_inputs, unpack_launch, unpack_reference, unpack_describe),
    )
)
