"""`apply_damped_inverse`: the Triton kernels in the interpreter and the CPU reference, against the definition."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.poison import poisoned_allocations
from triton_curv_kernels import apply_inverse
from triton_curv_kernels.apply_inverse import (
    CONFIGS,
    NUMERICS,
    ApplyConfig,
    ApplyProblem,
    apply_damped_inverse,
    default_config,
    launch_apply_damped_inverse,
    prune,
)
from triton_curv_kernels.apply_inverse_work import KEPT, _kept, work_of
from triton_curv_kernels.backend import VARIABLE, DeviceLimits, UnsupportedInputError

SMALL = ApplyConfig(16, 16, 1, 1)
HIP = DeviceLimits("hip", 304, 64 * 1024)
# (batch, r, c) or (r, c) of layers with two factors, and with one (None: no A)
PAIRS: list[tuple[int, ...]] = [(37, 20), (32, 48), (1, 1), (2, 3, 9), (0, 4), (2, 0, 4), (1, 70)]
SINGLES: list[tuple[int, ...]] = [(300, 2, 1), (1, 40, 1), (7, 1, 1), (5, 3), (33, 18), (0, 2, 1)]

Layers = tuple[list[Tensor], list[Tensor], list[Tensor]]
Apply = Callable[..., tuple[Tensor, Tensor, Tensor]]


def integers(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Small whole numbers: sums of products are exact in fp32."""
    return torch.randint(-2, 3, tuple(shape), generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def symmetric(*shape: int, dtype: torch.dtype) -> Tensor:
    half = integers((*shape, shape[-1]), torch.float32).tril()
    return (half + half.tril(-1).mT).to(dtype)


def layers(dtype: torch.dtype = torch.float32) -> Layers:
    """Gradients, A^-1 and G^-1 of all layers."""
    grads, of_a, of_g = [], [], []
    for shape, single in [(s, False) for s in PAIRS] + [(s, True) for s in SINGLES]:
        *batch, r, c = shape
        grads.append(integers(shape, dtype))
        of_a.append(torch.empty(0, dtype=dtype) if single else symmetric(*batch, c, dtype=dtype))
        of_g.append(symmetric(*batch, r, dtype=dtype))
    return grads, of_a, of_g


def definition(grads: list[Tensor], of_a: list[Tensor], of_g: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """P, <P, D> and ||P||^2 in float64, by einsum."""
    updates = []
    for d, a, g in zip(grads, of_a, of_g, strict=True):
        p = torch.einsum("...ij,...jk->...ik", g.double(), d.double())
        updates.append(p if a.shape == (0,) else torch.einsum("...ij,...jk->...ik", p, a.double()))
    products = torch.stack([(p * d.double()).sum() for p, d in zip(updates, grads, strict=True)])
    return updates, products, torch.stack([p.square().sum() for p in updates])


def check(apply: Apply, inputs: Layers, **options: Any) -> None:
    """Exactly the definition, for whole numbers; outputs hold NaN before."""
    expected, products, squares = definition(*inputs)
    updates = [torch.full_like(d, float("nan")) for d in inputs[0]]
    with poisoned_allocations():
        measured = apply(updates, *inputs, **options)
    for update, target in zip(updates, expected, strict=True):
        assert torch.equal(update, target.to(update.dtype))
    torch.testing.assert_close(measured[0].double(), products, rtol=1e-6, atol=0)
    torch.testing.assert_close(measured[1].double(), squares, rtol=1e-6, atol=0)
    assert measured[2].item() == 1.0


@pytest.mark.interpreter
@pytest.mark.parametrize("config", [SMALL, None], ids=["small", "default"])
def test_launch_is_exact(config: ApplyConfig | None) -> None:
    check(launch_apply_damped_inverse, layers(), config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_is_exact(dtype: torch.dtype) -> None:
    check(apply_damped_inverse, layers(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_launch_takes_16_bits_and_adds_up_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(40, 24, generator=generator).to(dtype)
    a, g = (torch.eye(n).add(0.01).to(dtype) for n in (24, 40))
    (target,), products, _ = definition([d], [a], [g])
    update = torch.full_like(d, float("nan"))
    measured = launch_apply_damped_inverse([update], [d], [a], [g], config=SMALL)
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(update.double(), target, rtol=2 * resolution, atol=4 * resolution)
    torch.testing.assert_close(measured[0].double(), products, rtol=2 * resolution, atol=0)


@pytest.mark.interpreter
def test_launch_takes_rows_apart_and_writes_nothing_between_them() -> None:
    memory = torch.full((2, 24, 32), float("nan"))
    update = memory[:, 2:22, 3:19]
    grad = torch.cat([integers((2, 20, 16), torch.float32)] * 2, dim=-1)[..., 8:24]
    a, g = (symmetric(2, n, dtype=torch.float32) for n in (16, 20))
    (target,), _, _ = definition([grad], [a], [g])
    launch_apply_damped_inverse([update], [grad], [a], [g], config=SMALL)
    assert torch.equal(update.double(), target)
    assert memory.isnan().sum() == memory.numel() - update.numel()


def positive() -> Layers:
    """Layers whose <P, D> are positive."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=generator) for s in ((5, 4), (3, 2, 1))]
    return grads, [torch.eye(4), torch.empty(0)], [torch.eye(5) * 2, torch.eye(2).repeat(3, 1, 1)]


@pytest.mark.interpreter
@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5, 0.1])], ids=["one lr", "lr of each layer"])
def test_clip_of_the_launch(lr: Tensor) -> None:
    check_clip(launch_apply_damped_inverse, lr)


@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5, 0.1])], ids=["one lr", "lr of each layer"])
def test_clip_of_the_reference(lr: Tensor) -> None:
    check_clip(apply_damped_inverse, lr)


@pytest.mark.interpreter
def test_clip_of_a_launch_that_clips_nothing_is_1() -> None:
    inputs = positive()
    assert definition(*inputs)[1].sum() > 1
    assert launch_apply_damped_inverse([torch.empty_like(d) for d in inputs[0]], *inputs)[2].item() == 1.0


def check_clip(apply: Apply, lr: Tensor) -> None:
    """min(1, sqrt(kappa / sum lr^2 <P, D>)): clipped, not clipped, nothing to clip, NaN."""
    inputs = positive()
    _, products, _ = definition(*inputs)
    decrease = (lr.double() ** 2 * products).sum()
    for kappa, expected in ((1e-3, torch.sqrt(1e-3 / decrease).item()), (1e6, 1.0)):
        updates = [torch.empty_like(d) for d in inputs[0]]
        clip = apply(updates, *inputs, torch.tensor(kappa), lr)[2]
        assert clip.shape == ()
        assert clip.item() == pytest.approx(expected, rel=1e-6)
    for value, expected in ((0.0, 1.0), (float("nan"), float("nan"))):
        grads = [torch.full_like(d, value) for d in inputs[0]]
        updates = [torch.empty_like(d) for d in grads]
        clip = apply(updates, grads, *inputs[1:], torch.tensor(1e-3), lr)[2]
        assert clip.item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.interpreter
def test_first_call_equals_second() -> None:
    generator = torch.Generator().manual_seed(0)
    grad, a, g = (torch.randn(s, generator=generator) for s in ((40, 36), (36, 36), (40, 40)))
    runs = []
    for _ in range(2):
        update = torch.empty_like(grad)
        runs.append([*launch_apply_damped_inverse([update], [grad], [a + a.mT], [g + g.mT], config=SMALL), update])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.interpreter
def test_variable_makes_the_op_launch_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setattr(apply_inverse, "apply_damped_inverse_reference", None)
    check(apply_damped_inverse, layers(), config=SMALL)


def test_lists_of_several_dtypes_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 layers of one factor: their P is exact, their sums are not in bf16."""
    monkeypatch.setenv(VARIABLE, "triton")
    wide, narrow = layers(), tuple(ts[len(PAIRS) :] for ts in layers(torch.bfloat16))
    check(apply_damped_inverse, tuple([*a, *b] for a, b in zip(wide, narrow, strict=True)))  # type: ignore[arg-type]


def test_tables_are_kept_for_the_same_tensors_only() -> None:
    grads, of_a, of_g = layers()
    updates = [torch.empty_like(d) for d in grads]
    first = work_of(updates, grads, of_a, of_g, 16)
    assert work_of(updates, grads, of_a, of_g, 16).matrices is first.matrices
    assert work_of(updates, grads, of_a, of_g, 32).matrices is not first.matrices
    moved = [d.clone() for d in grads]
    assert not torch.equal(work_of(updates, moved, of_a, of_g, 16).matrices, first.matrices)
    for _ in range(KEPT + 2):
        kept = [d.clone() for d in grads]
        work_of(updates, kept, of_a, of_g, 16)
    assert len(_kept) <= KEPT


@pytest.mark.parametrize("block", [16, 64])
def test_work_covers_every_tile_once_longest_first(block: int) -> None:
    grads, of_a, of_g = layers()
    work = work_of(grads, grads, of_a, of_g, block)
    tiles: set[tuple[int, ...]] = set()
    for m, row in enumerate(work.matrices.tolist()):
        if row[12] != 2:
            tiles |= {(m, i, j) for i in range(0, row[5], block) for j in range(0, row[6], block)}
    second = [tuple(x[:3]) for x in work.second.tolist()]
    assert len(second) == len(tiles)
    assert set(second) == tiles
    first = [(m, j, i) for m, i, j, _ in work.first.tolist() if work.matrices[m, 12] != 2]
    assert sorted(first) == sorted(second)
    lengths = [work.matrices[m, 5].item() for m, *_ in second]
    assert lengths == sorted(lengths, reverse=True)
    places = work.second[:, 3].tolist() + [p[3] for p in work.first.tolist() if work.matrices[p[0], 12] == 2]
    assert sorted(places) == list(range(len(work.layer_of)))
    for layer, (start, end) in enumerate(zip(work.layers.tolist(), work.layers.tolist()[1:], strict=False)):
        assert (work.layer_of[start:end] == layer).all()


@pytest.mark.parametrize(
    ("update", "grad", "a", "g", "message"),
    [
        ((3, 2), (3, 3), (3, 3), (3, 3), r"got \(3, 2\), \(3, 3\)"),
        ((3, 2), (3, 2), (3, 3), (3, 3), "at place 0"),
        ((3, 2), (3, 2), (2, 2), (2, 2), "at place 0"),
        ((2, 3, 2), (2, 3, 2), (2, 2), (2, 3, 3), "at place 0"),
        ((3,), (3,), (3, 3), (3, 3), "at place 0"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    update: tuple[int, ...], grad: tuple[int, ...], a: tuple[int, ...], g: tuple[int, ...], message: str
) -> None:
    updates, grads, of_a, of_g = ([torch.zeros(shape)] for shape in (update, grad, a, g))
    for apply in (apply_damped_inverse, launch_apply_damped_inverse):
        with pytest.raises(UnsupportedInputError, match=message):
            apply(updates, grads, of_a, of_g)


def test_other_errors_are_named() -> None:
    d, a, g = [torch.zeros(3, 2)], [torch.eye(2)], [torch.eye(3)]
    with pytest.raises(UnsupportedInputError, match="at least 1, got 0 updates, 0 grads"):
        apply_damped_inverse([], [], [], [])
    with pytest.raises(UnsupportedInputError, match="got 1 updates, 1 grads, 1 inverse_A, 2 inverse_G"):
        apply_damped_inverse(d, d, a, g * 2)
    with pytest.raises(UnsupportedInputError, match="both kl_clip and lr"):
        apply_damped_inverse(d, d, a, g, torch.tensor(1.0))
    with pytest.raises(UnsupportedInputError, match=r"lr \(\) or \(1,\), got \(\), \(2,\)"):
        apply_damped_inverse(d, d, a, g, torch.tensor(1.0), torch.ones(2))
    with pytest.raises(UnsupportedInputError, match=r"contiguous rows, got grads\[0\] of shape \(3, 2\)"):
        launch_apply_damped_inverse(d, [torch.zeros(2, 3).mT], a, g)
    with pytest.raises(UnsupportedInputError, match=r"one dtype .* got \['torch.bfloat16', 'torch.float32'\]"):
        launch_apply_damped_inverse(d, [d[0].bfloat16()], a, g)


def test_config_goes_through_integers() -> None:
    assert all(ApplyConfig.from_ints(c.to_ints()) == c for c in CONFIGS)
    assert all(hasattr(SMALL, field) for field in NUMERICS)


@pytest.mark.parametrize("limits", [DeviceLimits(), HIP], ids=lambda limits: limits.platform)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_is_one_of_the_pruned_configs(dtype: torch.dtype, limits: DeviceLimits) -> None:
    problem = ApplyProblem(1 << 20, dtype, limits)
    assert default_config(problem) in prune(CONFIGS, problem)


def test_prune_refuses() -> None:
    problem = ApplyProblem(1 << 20, torch.float32)
    precise = ApplyConfig(64, 32, 8, 3, "tf32x3")
    assert prune([precise], problem) == [precise]
    assert prune([precise], replace(problem, limits=HIP)) == []
    assert prune([precise], replace(problem, dtype=torch.bfloat16)) == []  # the same kernel as "ieee"
    assert prune([ApplyConfig(64, 64, 8, 3)], problem) == []
    assert prune([ApplyConfig(128, 64, 8, 4)], ApplyProblem(1 << 20, torch.bfloat16, HIP)) == []  # 128 KiB
