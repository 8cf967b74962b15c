"""Inputs of convolutions that pad with their own pixels: padded in parts, each a small share of what patches take."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from triton_curv_kernels.backend import UnsupportedInputError
from triton_curv_kernels.patch_config import COPY_SHARE
from triton_curv_kernels.patch_geometry import PaddingMode, PatchGeometry


def as_mode(name: str) -> PaddingMode:
    """The padding mode of this name.

    Raises UnsupportedInputError for another one.
    """
    for mode in get_args(PaddingMode):
        if name == mode:
            return mode  # type: ignore[no-any-return]  # get_args is untyped
    raise UnsupportedInputError(f"expected a padding mode out of {get_args(PaddingMode)}, got {name!r}")


def padded_parts(
    input: Tensor,
    sides: Sequence[int],
    mode: PaddingMode,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[Tensor]:
    """Parts of the padded input whose patches, without padding, are those of the whole, each once.

    A part takes at most COPY_SHARE of what the patches of all would: few samples, or if one is too much the pixels that
    few output positions of it see, one at least. `sides` holds (left, right) of each dimension.
    """
    sizes = [int(size) for size in input.shape[2:]]
    pairs = list(zip(sides[::2], sides[1::2], strict=True))
    most = [size - (mode == "reflect") for size in sizes]
    if mode != "replicate" and any(max(pair) > limit for pair, limit in zip(pairs, most, strict=True)):
        raise UnsupportedInputError(
            f"expected padding of at most {most} for padding mode {mode!r} of pixels {sizes}, got {pairs}"
        )
    padded = [size + before + behind for size, (before, behind) in zip(sizes, pairs, strict=True)]
    geometry = PatchGeometry.of(padded, kernel, stride, [0] * len(sides), dilation)
    samples = int(input.shape[0])
    pixels = COPY_SHARE * samples * geometry.positions * geometry.kernel_positions  # of a part, at most
    together = int(pixels / prod(padded))
    if together > 0 or samples == 0:
        flat = [side for before, behind in reversed(pairs) for side in (before, behind)]
        for some in input.split(max(1, together)):
            yield functional.pad(some, flat, mode=mode)
        return
    box = _box(geometry, pixels)
    starts = [range(0, out, step) for out, step in zip(geometry.outputs, box, strict=True)]
    for sample in input.split(1):
        for first in product(*starts):
            index = []
            for i, (start, count, (before, _)) in enumerate(zip(first, box, pairs, strict=True)):
                count = min(count, geometry.outputs[i] - start)
                places = _seen(count, geometry, i)
                at = torch.arange(places, device=input.device) + (start * geometry.stride[i] - before)
                index.append(_source(at, sizes[i], mode).view(-1, *[1] * (len(sizes) - 1 - i)))
            yield sample[(slice(None), slice(None), *index)]


def _seen(outputs: int, geometry: PatchGeometry, i: int) -> int:
    """Pixels along dimension i that so many neighbouring output positions see."""
    return (outputs - 1) * geometry.stride[i] + geometry.gaps[i] + 1


def _box(geometry: PatchGeometry, pixels: float) -> list[int]:
    """Output positions along each dimension that see no more than `pixels` pixels, or one position."""
    box = list(geometry.outputs)
    for i in range(len(box)):
        others = prod(_seen(box[j], geometry, j) for j in range(len(box)) if j != i)
        box[i] = max(1, min(box[i], int((pixels / others - geometry.gaps[i] - 1) // geometry.stride[i]) + 1))
        if others * _seen(box[i], geometry, i) <= pixels:
            break
    return box


def _source(at: Tensor, size: int, mode: PaddingMode) -> Tensor:
    """The pixels that lie at places `at` of a padded line, of which 0 to size - 1 are its own."""
    if mode == "circular":
        return at % size
    if mode == "replicate":
        return at.clamp(0, size - 1)
    return size - 1 - (size - 1 - at.abs()).abs()
