"""`accumulate_patch_factor_`: its Triton kernels in the interpreter, its configurations, its way through torch."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.offline import TracedKernels, traced_kernels
from tests.support.patches import Setting
from tests.support.poison import poisoned, poisoned_allocations
from tests.triton_curv_kernels.test_patch_reference import geometry_of
from triton_curv_kernels import UnsupportedInputError, accumulate_patch_factor_, patch_config, patch_pixel_rows
from triton_curv_kernels import patch as patch_file
from triton_curv_kernels.backend import VARIABLE, DeviceLimits
from triton_curv_kernels.factor import FactorConfig
from triton_curv_kernels.patch import (
    CONFIGS,
    NUMERICS,
    PatchConfig,
    PatchProblem,
    default_config,
    launch_accumulate_patch_factor_,
    prune,
)
from triton_curv_kernels.patch_config import ALGORITHMS, beside_a_copy, samples_of_part
from triton_curv_kernels.patch_geometry import PatchGeometry, displacements

ops = torch.ops.triton_curv
ONE_PASS = [PatchConfig(algorithm, 16, 16, 1, num_warps=1, num_stages=2) for algorithm in ALGORITHMS]
SPLIT = [replace(config, SPLIT_K=3) for config in ONE_PASS]
GATHER, IMPLICIT, DISPLACEMENT = ONE_PASS

SETTINGS = {
    "1d": Setting((2, 5, 9), (3,), {"padding": 1}),
    "no samples": Setting((0, 2, 4, 4), (2, 2)),
    "one pixel": Setting((1, 1, 1, 1), (1, 1)),
    "two tiles": Setting((3, 18, 5), (2,), {"padding": "same"}, channels_last=True),
    "2d": Setting((1, 3, 4, 5), (2, 3), {"padding": (0, 1)}, channels_last=True),
    "stride": Setting((2, 3, 6, 5), (2, 2), {"padding": 1, "stride": (2, 1)}),
    "dilation": Setting((2, 3, 4, 5), (2, 2), {"padding": (1, 2), "dilation": (1, 2)}),
    "groups": Setting((2, 2, 4, 3), (1, 2), {"padding": 1, "groups": 2}, channels_last=True),
    "depthwise": Setting((3, 1, 5), (2,), {"groups": 3}),
    "larger kernel": Setting((2, 2, 2), (4,), {"padding": 3}),
    # several steps of 16 pixels, which go over the ends of rows, planes, images and samples
    "many steps": Setting((9, 2, 5), (2,), {"padding": 1}),
    "many steps 3d": Setting((5, 1, 2, 3, 5), (1, 1, 2), {"padding": (0, 0, 1)}),
    "3d": Setting((2, 2, 3, 3, 4), (2, 1, 2), {"padding": (1, 0, 1)}),
}


def check(setting: Setting, config: PatchConfig | None, beta: float, ones: bool, dtype: torch.dtype) -> None:
    """Exactly the definition for whole numbers, and bitwise symmetric; an ignored factor may hold NaN."""
    input = setting.integers(dtype)
    factor = poisoned(setting.factor(ones).shape) if beta == 0 else setting.factor(ones)
    target = setting.expected(factor, input, 0.5, beta, ones)
    with poisoned_allocations():
        launch_accumulate_patch_factor_(factor, input, geometry_of(setting), 0.5, beta, ones, config)
    torch.testing.assert_close(factor.double(), target, rtol=0, atol=0)
    assert torch.equal(factor, factor.mT)


@pytest.mark.interpreter
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", SETTINGS)
def test_launch_is_exact(name: str, algorithm: str) -> None:
    setting, number = SETTINGS[name], ALGORITHMS.index(algorithm)
    if algorithm == "displacement" and not geometry_of(setting).shares_displacements:
        with pytest.raises(UnsupportedInputError, match="expected stride 1 and outputs at least as far"):
            check(setting, DISPLACEMENT, 1.0, False, torch.float32)
        return
    check(setting, ONE_PASS[number], 0.25, True, torch.bfloat16)
    check(setting, SPLIT[number], 0.0, False, torch.float32)


ONE_PIXEL = {
    "rows of samples": (Setting((3, 20, 5, 6), (1, 1)), True, torch.bfloat16),
    "stride": (Setting((2, 3, 3, 6), (1, 1), {"stride": 2}), True, torch.float16),
    "groups": (Setting((2, 4, 3, 4), (1, 1), {"stride": (1, 2), "groups": 2}), False, torch.float32),
    "3d": (Setting((2, 3, 3, 2, 4), (1, 1, 1), {"stride": (2, 1, 2)}), True, torch.float32),
    "no samples": (Setting((0, 4, 3, 3), (1, 1)), True, torch.float32),
    "channels last": (Setting((2, 4, 3, 3), (1, 1), {"stride": 2}, channels_last=True), True, torch.float32),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("name", ONE_PIXEL)
def test_one_pixel_is_exact_in_any_layout(name: str, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_pixel_rows, "within_memory", lambda *_: FactorConfig(16, 16, split, 1, 2))
    setting, ones, dtype = ONE_PIXEL[name]
    check(setting, None, 0.25 if split == 1 else 0.0, ones, dtype)


@pytest.mark.interpreter
def test_channels_far_apart_are_gathered() -> None:
    """A small input in another layout than channels_last is read in place."""
    check(Setting((2, 18, 4, 3), (2, 2), {"padding": 1}), None, 0.25, True, torch.bfloat16)


@pytest.mark.interpreter
@pytest.mark.parametrize("config", SPLIT, ids=ALGORITHMS)
def test_split_ones_are_exact(config: PatchConfig) -> None:
    check(SETTINGS["2d"], config, 0.25, True, torch.float16)


@pytest.mark.interpreter
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("algorithm", ["implicit", "displacement"])
def test_large_tiles_are_stored_whole(algorithm: Any, block: int) -> None:
    """They go in parts of 32 columns, and by displacement to several blocks each."""
    setting = Setting((2, 70 if block == 64 else 130, 4), (2,), {"padding": 1}, channels_last=True)
    check(setting, PatchConfig(algorithm, block, 16), 0.25, False, torch.bfloat16)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("config", "dtype"),
    [(GATHER, torch.bfloat16), (IMPLICIT, torch.float32), (DISPLACEMENT, torch.bfloat16), (SPLIT[1], torch.float16)],
)
def test_launch_accumulates_in_fp32(config: PatchConfig, dtype: torch.dtype) -> None:
    """Rounding of products or sums to 16 bits, or to TF32, would be off by 1e-3."""
    setting = Setting((3, 5, 12), (2,), {"padding": 1})
    input = torch.randn(setting.input, generator=torch.Generator().manual_seed(0)).to(dtype)
    factor = setting.factor(ones=True)
    target = setting.expected(factor, input, 0.7, 0.3, ones=True)
    launch_accumulate_patch_factor_(factor, input, geometry_of(setting), 0.7, 0.3, True, config)
    torch.testing.assert_close(factor.double(), target, rtol=1e-6, atol=2e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("config", [GATHER, SPLIT[2]], ids=["gather", "displacement"])
def test_second_call_equals_the_first(config: PatchConfig) -> None:
    setting = Setting((2, 3, 8), (2,), {"padding": 1})
    input = torch.randn(setting.input, generator=torch.Generator().manual_seed(0))
    first, second = setting.factor(ones=True), setting.factor(ones=True)
    for factor in (first, second):
        launch_accumulate_patch_factor_(factor, input, geometry_of(setting), 0.7, 0.3, True, config)
    assert torch.equal(first, second)


@pytest.mark.interpreter
@pytest.mark.parametrize("config", [IMPLICIT, SPLIT[2]], ids=["one pass", "split"])
def test_launch_writes_the_view_and_nothing_else(config: PatchConfig) -> None:
    setting = Setting((2, 3, 5), (2,), {"groups": 2})
    memory = poisoned((2, 12, 20))
    factor = memory[:, 2:9, 3:17:2]
    factor.copy_(setting.factor(ones=True))
    input = setting.integers()
    target = setting.expected(factor, input, 1.0, 1.0, ones=True)
    launch_accumulate_patch_factor_(factor, input, geometry_of(setting), ones=True, config=config)
    assert torch.equal(factor.double(), target)
    assert memory.isnan().sum() == memory.numel() - factor.numel()


@pytest.mark.interpreter
def test_variable_makes_the_op_launch_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way through the dispatcher into the kernels, padded first for a mode other than zeros."""
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setattr(patch_file, "accumulate_patch_factor_reference", None)
    for mode in ("zeros", "circular"):
        setting = Setting((2, 3, 5, 4), (2, 2), {"padding": 1, "padding_mode": mode}, channels_last=True)
        factor, input = setting.factor(ones=False)[0], setting.integers()
        target = setting.expected(factor[None], input, 1.0, 1.0, ones=False)
        accumulate_patch_factor_(factor, input, setting.kernel, **setting.arguments)
        assert torch.equal(factor[None].double(), target)


def arguments(device: str = "cpu") -> list[Any]:
    return [torch.zeros(1, 577, 577, device=device), torch.ones(4, 64, 8, 8, device=device)]


def step(factor: Tensor, input: Tensor) -> None:
    accumulate_patch_factor_(factor, input, 3, padding=1, ones=True, alpha=0.5, beta=0.9)


def test_opcheck() -> None:
    factor, input = arguments()
    geometry = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1])
    config = PatchConfig("implicit", 64, 32, 2).to_ints()
    torch.library.opcheck(ops.accumulate_patch_factor_, (factor, input, *geometry, 0.5, 0.9, True, config))
    torch.library.opcheck(ops.accumulate_patch_factor_, (factor[:, :27, :27], input[:1, :3].bfloat16(), *geometry))
    padded = (*geometry, "reflect", 0.5, 0.9, True, None, "")
    torch.library.opcheck(ops.accumulate_padded_patch_factor_, (factor, input, *padded))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_cpu_graph_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled = arguments(), arguments()
    step(*eager)
    torch.compile(step, backend=backend, fullgraph=True)(*compiled)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_cuda_graph_holds_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large input that is not channels_last is copied in parts, here of a sample each, with launches of their own."""
    config = PatchConfig("displacement", 64, 32, 2)

    def displaced(factor: Tensor, input: Tensor) -> None:
        accumulate_patch_factor_(factor, input, 3, padding=1, ones=True, config=config)

    def channels_last() -> list[Any]:
        factor, input = arguments("cuda")
        return [factor, input.to(memory_format=torch.channels_last)]

    assert traced_kernels(displaced, channels_last) == TracedKernels(2, [])
    assert traced_kernels(displaced, lambda: arguments("cuda")) == TracedKernels(2, [])
    monkeypatch.setattr(patch_config, "SMALL_INPUT", 0)
    monkeypatch.setattr(patch_config, "COPY_SHARE", 0.03)
    assert traced_kernels(displaced, lambda: arguments("cuda")) == TracedKernels(4 * 2, [])
    assert traced_kernels(step, channels_last).opaque == []


def test_no_gradient_flows() -> None:
    factor, input = arguments()
    step(factor, input.requires_grad_())
    assert not factor.requires_grad


@pytest.mark.parametrize(
    ("factor", "input", "arguments", "message"),
    [
        ((1, 4, 4), (2, 1, 5, 5), {"kernel_size": 3}, r"expected a factor \(1, 9, 9\) .* got \(1, 4, 4\)"),
        ((2, 9, 9), (2, 1, 5, 5), {"kernel_size": 3}, "expected a factor of 1 groups"),
        ((2, 9, 9), (2, 3, 5, 5), {"kernel_size": 3, "groups": 2}, "groups divide the channels"),
        ((1, 9, 9), (2, 1, 2, 5), {"kernel_size": 3}, "expected a kernel that fits into the padded input"),
        ((1, 9, 9), (2, 1, 5, 5), {"kernel_size": 3, "stride": 0}, "expected kernel, stride and dilation of 1 or more"),
        ((1, 9, 9), (2, 1, 5, 5), {"kernel_size": 3, "padding": "full"}, "'same' or 'valid', got 'full'"),
        ((1, 9, 9), (2, 1, 5, 5), {"kernel_size": (3, 3, 1)}, "expected kernel_size of 2 integers"),
        ((1, 9, 9), (2, 1, 3, 3, 3, 3), {"kernel_size": 3}, "expected 1 to 3 spatial dimensions"),
    ],
)
def test_what_does_not_fit_is_named(
    factor: tuple[int, ...], input: tuple[int, ...], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        accumulate_patch_factor_(torch.zeros(factor), torch.zeros(input), **arguments)


def test_dtypes_that_triton_does_not_take_are_named() -> None:
    geometry = geometry_of(Setting((1, 1, 4), (2,)))
    for of_factor, of_input in ((torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16)):
        factor, input = torch.zeros(1, 2, 2, dtype=of_factor), torch.zeros(1, 1, 4, dtype=of_input)
        with pytest.raises(UnsupportedInputError, match=f"got {of_factor} and {of_input}"):
            launch_accumulate_patch_factor_(factor, input, geometry)


def test_too_many_pixels_are_named() -> None:
    input = torch.empty(1, 1, 2**31, dtype=torch.float16, device="meta")
    geometry = PatchGeometry.of(input.shape[2:], (2,), (1,), (0, 0), (1,))
    with pytest.raises(UnsupportedInputError, match=r"fewer than 2\^31 pixels"):
        launch_accumulate_patch_factor_(torch.empty(1, 2, 2, device="meta"), input, geometry, config=GATHER)


def test_config_goes_through_integers() -> None:
    assert len(set(CONFIGS)) == len(CONFIGS)
    for config in CONFIGS:
        assert PatchConfig.from_ints(config.to_ints()) == config
    assert all(hasattr(CONFIGS[0], name) for name in NUMERICS)


def problem(
    samples: int, channels: int, size: int, stride: int = 1, limits: DeviceLimits | None = None, **changes: Any
) -> PatchProblem:
    """A 3x3 convolution of square images."""
    geometry = PatchGeometry.of((size, size), (3, 3), (stride, stride), (1, 1, 1, 1), (1, 1))
    made = PatchProblem(samples, channels, 1, geometry, torch.bfloat16, limits=limits or DeviceLimits())
    return replace(made, **changes)


HIP = DeviceLimits("hip", 304, 64 * 1024)
A100 = DeviceLimits("cuda", 108, 163 * 1024)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"limits": HIP}, PatchConfig("implicit", 128, 64, num_stages=3)),  # 96 KiB
        ({"dtype": torch.float32}, PatchConfig("implicit", 64, 64)),
        ({"per_group": 33}, PatchConfig("implicit", 128, 64)),
        ({"samples": 1}, PatchConfig("displacement", 64, 64, SPLIT_K=2)),  # a workspace of 2 x 832 KiB
        ({"geometry": problem(32, 128, 28, stride=2).geometry}, PatchConfig("displacement", 64, 64)),
        ({"geometry": PatchGeometry.of((4, 4), (4, 4), (1, 1), (0,) * 4, (1, 1))}, PatchConfig("displacement", 64, 32)),
    ],
)
def test_prune_refuses(changes: dict[str, Any], refused: PatchConfig) -> None:
    fine = problem(32, 128, 28)
    assert prune([refused], fine) == [refused]
    assert prune([refused], replace(fine, **changes)) == []


@pytest.mark.parametrize("limits", [DeviceLimits(), A100, HIP], ids=["H100", "A100", "MI300"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_is_one_of_the_pruned_configs_and_needs_little_memory(dtype: torch.dtype, limits: DeviceLimits) -> None:
    for samples, channels, size in ((32, 64, 56), (256, 512, 7), (32, 256, 14), (8, 3, 224), (1, 16, 1), (32, 24, 28)):
        for stride, aligned in ((1, True), (2, True), (1, False)):
            asked = problem(samples, channels, size, stride, limits, dtype=dtype, aligned=aligned)
            config = default_config(asked)
            assert config in prune(CONFIGS, asked)
            assert 4 * config.workspace(asked) <= 0.05 * asked.patch_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_and_workspace_take_less_than_5_percent_of_patches(dtype: torch.dtype) -> None:
    """Of inputs that are not channels_last, in the convolutions of ResNet-50 that have patches."""
    for limits, samples, (channels, size) in product(
        (DeviceLimits(), A100, HIP),
        (32, 256),
        ((64, 56), (128, 28), (256, 14), (512, 7), (128, 56), (256, 28), (512, 14)),
    ):
        asked = problem(samples, channels, size, 1 + (channels * size > 3584), limits, dtype=dtype)
        config = beside_a_copy(default_config(asked), asked)
        copied = samples_of_part(asked) * channels * size**2 * dtype.itemsize
        assert copied + 4 * config.workspace(asked) <= 0.05 * asked.patch_bytes
        assert copied > 0
        assert samples_of_part(replace(asked, samples=1)) == 0  # read in place


def test_default_algorithm() -> None:
    assert default_config(problem(32, 64, 56)).algorithm == "displacement"
    assert default_config(problem(32, 64, 56)).SPLIT_K > 1  # 13 products would keep 13 multiprocessors busy
    assert default_config(problem(32, 64, 56, stride=2)).algorithm == "implicit"
    assert default_config(problem(32, 3, 224)).algorithm == "gather"


def test_displacements_are_half_of_all() -> None:
    assert displacements((2, 2)) == ((0, 0), (0, 1), (1, -1), (1, 0), (1, 1))
    assert len(displacements((3, 3))) == 13
    assert len(displacements((3, 3, 3))) == 63
