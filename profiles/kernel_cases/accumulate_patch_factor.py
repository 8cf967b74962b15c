"""`accumulate_patch_factor_`: factor A of the 3x3 convolutions of ResNet-50, against unfold and a product."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from profiles.kernel_cases.case import Case
from profiles.kernel_cases.shapes import ConvShape, resnet50_convs
from triton_curv_kernels import accumulate_patch_factor_

SMALL = ConvShape("3x3, 64 channels, 32x32", 32, 64, 32, 32, 64, 3, 1, 1)
DIGITS = ConvShape("3x3, 16 channels, 8x8", 128, 16, 8, 8, 32, 3, 1, 1)
CPU_BAR = "at least 2 times unfold + mm, at most 0.2 of its peak memory"
BAR = "at least 5 times unfold + mm, less than 5 % of the memory of patches"


def unfold_mm_(factor: Tensor, input: Tensor, conv: ConvShape) -> None:
    """What a user does: `unfold`, one product, added. Rows and columns are ordered channel first."""
    patches = functional.unfold(input, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    rows = patches.mT.reshape(-1, conv.patch)
    if factor.dtype == rows.dtype:
        factor.addmm_(rows.mT, rows)
    else:
        factor.add_(rows.mT @ rows)


def error_of(call: str, input: Tensor, conv: ConvShape) -> float:
    """Largest error of one accumulation from zero against float64, relative to the largest value."""
    size = conv.patch
    factor = input.new_zeros(size, size, dtype=torch.float32)
    order = torch.arange(size, device=input.device)
    if call == "ours":
        accumulate_patch_factor_(factor, input, conv.kernel_size, conv.stride, conv.padding)
        order = order.view(conv.in_channels, -1).mT.flatten()
    else:
        unfold_mm_(factor, input, conv)
    oracle = input.new_zeros(size, size, dtype=torch.float64)
    for some in input.split(4):  # unfolded in float64, a whole batch would not fit
        unfold_mm_(oracle, some.double(), conv)
    oracle = oracle[order][:, order]
    return float((factor - oracle).abs().max() / oracle.abs().max())


def least_flops(conv: ConvShape) -> float:
    """Half of a square product; with stride 1, half of the differences of kernel positions, by the boundary more."""
    if conv.stride > 1:
        return conv.positions * conv.patch * (conv.patch + 1)
    return conv.positions * conv.in_channels**2 * (2 * conv.kernel_size - 1) ** 2


def case_of(conv: ConvShape, device: torch.device, dtype: torch.dtype, bar: str) -> Case:
    """One convolution, its input in channels_last."""
    shape = (conv.batch, conv.in_channels, conv.height, conv.width)
    generator = torch.Generator(device).manual_seed(0)
    input = torch.randn(shape, device=device, generator=generator).to(dtype, memory_format=torch.channels_last)
    factor, other = (torch.zeros(conv.patch, conv.patch, device=device) for _ in range(2))
    ours = partial(accumulate_patch_factor_, factor, input, conv.kernel_size, conv.stride, conv.padding)
    theirs = partial(unfold_mm_, other, input, conv)
    return Case(
        op="accumulate_patch_factor_",
        name=f"{conv.name} batch {conv.batch} {str(dtype).removeprefix('torch.')}",
        ours=ours,
        alternatives={"unfold+mm": theirs},
        error=partial(error_of, "ours", input, conv),
        allowed_error=lambda: 2 * error_of("unfold+mm", input, conv),
        flops=least_flops(conv),
        bytes=input.numel() * input.element_size() + 8 * conv.patch**2,
        bound="fp32" if dtype == torch.float32 else "tensor",
        bar=bar,
        peak_bytes={"ours": ours, "unfold+mm": theirs},
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """On a GPU the different 3x3 convolutions of ResNet-50 at batch 32 and 256; on CPU the one of the issue."""
    if device.type == "cpu":
        yield case_of(SMALL, device, torch.float32, CPU_BAR)
        if not quick:
            yield case_of(DIGITS, device, torch.float32, "never slower than unfold + mm")
        return
    for batch in (32,) if quick else (32, 256):
        seen = set()
        for conv in resnet50_convs(batch):
            if conv.kernel_size == 3 and conv[1:] not in seen:
                seen.add(conv[1:])
                yield case_of(conv, device, torch.bfloat16, BAR if conv.stride == 1 else "")
    if not quick:
        first = next(conv for conv in resnet50_convs(32) if conv.kernel_size == 3)
        yield case_of(first, device, torch.float32, "")
