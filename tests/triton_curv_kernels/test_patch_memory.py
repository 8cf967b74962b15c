"""Memory of `accumulate_patch_factor_` beside its arguments: less than 5 % of what `unfold` would take."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from profiles.kernel_cases.shapes import ConvShape, resnet50_convs
from tests.support.allocations import nothing_launched, peak_allocated, unfolded_bytes
from triton_curv.profiling.stopwatch import peak_extra_bytes
from triton_curv_kernels import UnsupportedInputError, accumulate_patch_factor_, patch_config, patch_pixel_rows
from triton_curv_kernels.backend import DeviceLimits
from triton_curv_kernels.patch import accumulate_padded_parts_, launch_accumulate_patch_factor_
from triton_curv_kernels.patch_geometry import PatchGeometry
from triton_curv_kernels.patch_padding import padded_parts

LIMITS = {"H100": DeviceLimits(), "MI300": DeviceLimits("hip", 304, 64 * 1024)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
CPU = torch.device("cpu")


def geometry_of(conv: ConvShape) -> PatchGeometry:
    kernel, stride = (conv.kernel_size,) * 2, (conv.stride,) * 2
    return PatchGeometry.of((conv.height, conv.width), kernel, stride, (conv.padding,) * 4, (1, 1))


def convs(batches: tuple[int, ...]) -> Iterator[ConvShape]:
    """All different convolutions of ResNet-50."""
    for batch in batches:
        yield from {conv._replace(name=""): conv for conv in resnet50_convs(batch)}.values()


def share_of_launches(conv: ConvShape, dtype: torch.dtype, layout: torch.memory_format, ones: bool) -> float:
    """Most that the launcher allocates at a time, over what `unfold` takes."""
    sizes = (conv.batch, conv.in_channels, conv.height, conv.width)
    input = torch.empty(sizes, dtype=dtype, device="meta").to(memory_format=layout)
    geometry, size = geometry_of(conv), conv.patch + ones
    factor = torch.empty(1, size, size, device="meta")
    with nothing_launched():
        extra = peak_allocated(lambda: launch_accumulate_patch_factor_(factor, input, geometry, 0.5, 0.9, ones))
    return extra / unfolded_bytes(input, geometry.kernel_positions, geometry.positions)


@pytest.fixture(params=LIMITS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Defaults of a GPU that is not here."""
    for module in (patch_config, patch_pixel_rows):
        monkeypatch.setattr(module, "device_limits", lambda _: LIMITS[request.param])
    return str(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches_of_all_real_convolutions(device: str, layout: str) -> None:
    """In batches of 1, where one sample is all, as in large ones; copies and workspaces together."""
    for conv, dtype in product(convs((1, 4, 8, 32, 256)), (torch.bfloat16, torch.float32)):
        share = share_of_launches(conv, dtype, LAYOUTS[layout], ones=True)
        assert share < 0.05, (device, conv, dtype, share)


def test_the_measurement_sees_copies_and_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: twice the copies, and workspaces of any size for pixels."""
    three, one = (next(c for c in convs((32,)) if c.kernel_size == k and c.in_channels == 64) for k in (3, 1))
    assert share_of_launches(three, torch.bfloat16, torch.contiguous_format, True) > 0.02
    with monkeypatch.context() as patch:
        patch.setattr(patch_config, "COPY_SHARE", 0.1)
        assert share_of_launches(three, torch.bfloat16, torch.contiguous_format, True) > 0.05
    assert 0 < share_of_launches(one, torch.bfloat16, torch.channels_last, True) < 0.05
    monkeypatch.setattr(patch_pixel_rows, "within_memory", lambda config, problem: config)
    for layout in LAYOUTS.values():
        assert share_of_launches(one, torch.bfloat16, layout, True) > 0.05


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("batch", [1, 32])
def test_launches_of_padded_inputs(mode: Any, batch: int) -> None:
    """The padded input goes in parts, too: of samples, or of rows of one."""
    for channels, size in ((64, 56), (256, 14), (512, 7)):
        input = torch.empty(batch, channels, size, size, dtype=torch.bfloat16, device="meta")
        factor = torch.empty(1, 9 * channels, 9 * channels, device="meta")
        geometry = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1], mode)
        with nothing_launched():
            extra = peak_allocated(partial(accumulate_padded_parts_, factor, input, *geometry, 0.5, 0.9, False))
        assert 0 < extra < 0.05 * unfolded_bytes(input, 9, size**2), (extra, channels, size)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_parts_see_each_output_once(mode: Any) -> None:
    """Boxes of outputs of one sample, against the whole padded by torch."""
    input = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    whole = functional.pad(input, (2, 1, 1, 3), mode=mode)
    patches = functional.unfold(whole, (3, 2), stride=2, dilation=(1, 2)).mT.reshape(-1, 18)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton_curv_kernels.patch_padding.COPY_SHARE", 0.1)
        parts = list(padded_parts(input, [1, 3, 2, 1], mode, [3, 2], [2, 2], [1, 2]))
    assert len(parts) > 4
    found = torch.cat([functional.unfold(p, (3, 2), stride=2, dilation=(1, 2)).mT.reshape(-1, 18) for p in parts])
    assert sorted(found.tolist()) == sorted(patches.tolist())


@pytest.mark.parametrize(("mode", "amount"), [("circular", 4), ("reflect", 3)])
def test_more_padding_than_pixels_is_named(mode: Any, amount: int) -> None:
    with pytest.raises(UnsupportedInputError, match=rf"padding of at most .* mode '{mode}' of pixels \[3\]"):
        accumulate_patch_factor_(torch.zeros(3, 3), torch.zeros(1, 1, 3), 3, 1, amount, padding_mode=mode)


def share_of_reference(sizes: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, stride: int) -> float:
    """Most that the reference allocates at a time for a kernel of one pixel, over what `unfold` takes."""
    input = torch.randn(sizes).to(dtype).to(memory_format=layout)
    factor = torch.zeros(sizes[1] + 1, sizes[1] + 1)
    extra = peak_extra_bytes(lambda: accumulate_patch_factor_(factor, input, 1, stride, ones=True), CPU)
    return extra / unfolded_bytes(input, 1, (sizes[2] // stride) ** 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 16])
def test_reference_for_one_pixel_copies_nothing(batch: int, layout: str) -> None:
    """`unfold` copies the input; with a stride or 16 bits, a few rows of pixels are copied at a time."""
    sizes, order = (batch, 32, 64, 64), LAYOUTS[layout]
    assert share_of_reference(sizes, order, torch.float32, 1) < 0.01
    assert share_of_reference(sizes, order, torch.bfloat16, 1) < 0.05
    assert share_of_reference(sizes, order, torch.float32, 2) < 0.05


def test_padded_input_in_a_graph() -> None:
    """As eagerly, the padded input is never there as a whole."""
    input, factor = torch.randn(32, 64, 32, 32), torch.zeros(576, 576)

    def step(factor: Tensor, input: Tensor) -> None:
        accumulate_patch_factor_(factor, input, 3, padding=1, padding_mode="circular")

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    extra = peak_extra_bytes(lambda: compiled(factor, input), CPU)
    assert extra < 0.05 * 2 * unfolded_bytes(input, 9, 32**2)  # with the copy that turns it into rows
