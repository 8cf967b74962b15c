"""`accumulate_patch_factor_` on CPU, both ways of its reference: against patches by convolution, in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.support.patches import Setting
from tests.support.poison import poisoned, poisoned_allocations
from triton_curv.profiling.stopwatch import peak_extra_bytes
from triton_curv_kernels import accumulate_patch_factor_, patch_padding
from triton_curv_kernels.patch_geometry import PatchGeometry, padding_sides, per_dimension
from triton_curv_kernels.patch_reference import (
    accumulate_patch_factor_reference,
    by_displacement,
    by_patches,
    prefers_displacement,
)

SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 4)}
KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}


def geometry_of(setting: Setting) -> PatchGeometry:
    """Of a zero-padded convolution."""
    dims = len(setting.kernel)
    dilation = per_dimension(setting.arguments.get("dilation", 1), dims, "dilation")
    stride = per_dimension(setting.arguments.get("stride", 1), dims, "stride")
    sides = padding_sides(setting.arguments.get("padding", 0), setting.kernel, dilation)
    return PatchGeometry.of(setting.input[2:], setting.kernel, stride, sides, dilation)


def accumulate(setting: Setting, factor: Tensor, input: Tensor, alpha: float, beta: float, ones: bool) -> None:
    """The public call with the setting's arguments."""
    arguments: dict[str, Any] = setting.arguments
    accumulate_patch_factor_(factor, input, setting.kernel, ones=ones, alpha=alpha, beta=beta, **arguments)


def check(setting: Setting, way: Callable[..., None] | None, beta: float, ones: bool) -> None:
    """Exactly the definition for whole numbers in fp32, and bitwise symmetric."""
    input = setting.integers()
    factor = poisoned(setting.factor(ones).shape) if beta == 0 else setting.factor(ones)
    target = setting.expected(factor, input, 0.5, beta, ones)
    with poisoned_allocations():
        if way is None:
            accumulate(setting, factor, input, 0.5, beta, ones)
        else:
            way(factor, input, geometry_of(setting), 0.5, beta, ones)
    torch.testing.assert_close(factor.double(), target, rtol=0, atol=0)
    assert torch.equal(factor, factor.mT)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_all_settings(dims: int, mode: str) -> None:
    """Stride x padding x dilation x groups x memory format, of 1 to 3 dimensions."""
    for stride, padding, dilation, groups, channels_last in product(
        (1, 2), (0, 1, "same", "valid"), (1, 2), (1, 2), (False, True)
    ):
        if (padding == "same" and stride > 1) or (dims == 3 and channels_last):
            continue
        arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        shape = (2, 3, *SIZES[dims])
        setting = Setting(shape, KERNELS[dims], {**arguments, "padding_mode": mode}, channels_last)
        check(setting, None, 0.25, ones=groups == 1)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_goes_by_few_samples(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_padding, "COPY_SHARE", 0.15)  # 2 of 3 samples
    padded: list[int] = []
    pad = functional.pad

    def recording(input: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if options.get("mode") == mode:
            padded.append(len(input))
        return pad(input, *arguments, **options)

    monkeypatch.setattr(functional, "pad", recording)
    setting = Setting((3, 2, 6, 7), (3, 3), {"padding": (1, 2), "padding_mode": mode, "groups": 2})
    check(setting, None, 0.25, ones=True)
    assert padded == [3, 2, 1]  # the first is the oracle's


ZEROS = {
    "no samples": Setting((0, 2, 5, 5), (3, 3), {"padding": 1}),
    "one pixel": Setting((1, 1, 1), (1,)),
    "one sample": Setting((1, 2, 6), (3,), {"padding": 1}),
    "larger kernel": Setting((2, 3, 2, 3), (5, 4), {"padding": (3, 2)}),
    "wide padding": Setting((2, 2, 3, 4), (2, 3), {"padding": (5, 3)}),
    "narrow padding": Setting((2, 2, 6, 7), (5, 4), {"padding": (1, 2)}),
    "few outputs": Setting((3, 2, 7, 8), (4, 7), {"padding": 0}),
    "dilated": Setting((2, 3, 7, 6), (3, 2), {"padding": (1, 2), "dilation": (3, 2)}),
    "uneven": Setting((2, 3, 7, 6), (2, 4), {"padding": "same", "dilation": (3, 1)}),
    "grouped": Setting((2, 3, 6, 5), (3, 3), {"padding": 1, "groups": 3}, channels_last=True),
    "depthwise": Setting((2, 1, 6, 5), (3, 3), {"padding": 1, "groups": 4}),
    "3d": Setting((2, 2, 4, 5, 3), (3, 2, 3), {"padding": (1, 0, 2), "dilation": (1, 2, 1)}),
}


@pytest.mark.parametrize("way", [by_patches, by_displacement])
@pytest.mark.parametrize("name", ZEROS)
def test_both_ways_are_exact(name: str, way: Callable[..., None]) -> None:
    for beta, ones, scratch in ((0.0, True, 1), (0.25, False, 1 << 19), (1.0, True, 1 << 19)):
        check(ZEROS[name], partial(way, scratch=scratch), beta, ones)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 7), (2, 4, 3, 2, 4), (0, 4, 3, 3), (1, 1, 1)], ids=str)
def test_one_pixel_is_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for stride, groups, channels_last, ones, beta in product(
        (1, 2), (1, 2), (False, True), (False, True), (0.0, 0.25, 1.0)
    ):
        setting = Setting(shape, (1,) * len(shape[2:]), {"stride": stride, "groups": groups}, channels_last)
        input = setting.integers(dtype)
        factor = setting.factor(ones) if beta else poisoned(setting.factor(ones).shape)
        target = setting.expected(factor, input, 0.5, beta, ones)
        accumulate(setting, factor, input, 0.5, beta, ones)
        torch.testing.assert_close(factor.double(), target, rtol=0, atol=0)
        assert torch.equal(factor, factor.mT)


@pytest.mark.parametrize("stride", [2, (1, 3)])
def test_patches_with_stride_are_exact(stride: int | tuple[int, int]) -> None:
    setting = Setting((3, 2, 8, 7), (3, 2), {"padding": (1, 0), "stride": stride, "dilation": (1, 2)})
    for scratch in (1, 1 << 19):
        check(setting, partial(by_patches, scratch=scratch), 0.25, True)


@pytest.mark.parametrize(("channels", "displaced"), [(64, True), (3, False)])
def test_both_ways_agree_in_float64(channels: int, displaced: bool) -> None:
    setting = Setting((4, channels, 12, 11), (3, 3), {"padding": 1})
    geometry = geometry_of(setting)
    assert prefers_displacement(geometry, 4, channels, 1) is displaced
    input = torch.randn(setting.input, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = setting.expected(torch.zeros(1, setting.n + 1, setting.n + 1), input, 0.5, 0.0, ones=True)
    for way in (by_patches, by_displacement, accumulate_patch_factor_reference):
        factor = torch.empty_like(target)
        way(factor, input, geometry, 0.5, 0.0, True)
        torch.testing.assert_close(factor, target, rtol=1e-12, atol=1e-12 * float(target.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 32])
def test_inputs_of_16_bits(channels: int, dtype: torch.dtype) -> None:
    setting = Setting((4, channels, 12, 11), (3, 3), {"padding": 1})
    factor, input = setting.factor(ones=True), setting.integers(dtype)
    target = setting.expected(factor, input, 0.5, 0.25, ones=True)
    accumulate(setting, factor, input, 0.5, 0.25, ones=True)
    assert torch.equal(factor.double(), target)


def test_few_positions_keep_patches() -> None:
    """What a displacement saves must pay for its many calls: digits of 8 x 8 pixels, few samples, borders only."""
    square = PatchGeometry.of((8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    assert prefers_displacement(square, 128, 16, 1)
    assert not prefers_displacement(square, 8, 16, 1)
    assert not prefers_displacement(square, 128, 1, 1)
    assert not prefers_displacement(replace(square, outputs=(4, 4), stride=(2, 2)), 1024, 64, 1)
    assert not prefers_displacement(PatchGeometry.of((14, 14), (7, 7), (1, 1), (0,) * 4, (1, 1)), 32, 16, 1)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_peak_memory_is_far_below_that_of_patches(mode: str) -> None:
    setting = Setting((32, 64, 32, 32), (3, 3), {"padding": 1, "padding_mode": mode})
    input, factor = torch.randn(setting.input), torch.zeros(1, setting.n, setting.n)

    def unfolding() -> None:
        patches = functional.unfold(input, 3, padding=1).mT.reshape(-1, setting.n)
        factor[0].addmm_(patches.mT, patches)

    cpu = torch.device("cpu")
    ours = peak_extra_bytes(lambda: accumulate(setting, factor, input, 1.0, 1.0, False), cpu)
    assert ours < 0.05 * peak_extra_bytes(unfolding, cpu)
