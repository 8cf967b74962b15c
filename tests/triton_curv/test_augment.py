"""Running mixup and random erasing: recurrences, distributions, edges."""

import pytest
import torch
from torch import Tensor

import triton_curv as tc
from triton_curv.augment import RandomErasing, RunningMixup


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def one_hot(n: int) -> Tensor:
    return torch.eye(4)[torch.arange(n) % 4]


def test_mixup_carries_the_mixed_batch() -> None:
    """Each sample mixes with its own weight, the same for inputs and targets: both follow one recurrence."""
    mixup = RunningMixup(0.4, generator())
    x = [torch.randn(5, 4) for _ in range(4)]
    y = [torch.randn(5, 4) for _ in range(4)]
    carried = mixup(x[0], y[0])
    assert torch.equal(carried[0], x[0])
    for fresh_x, fresh_y in zip(x[1:], y[1:], strict=True):
        kept = fresh_x.clone()
        mixed = mixup(fresh_x, fresh_y)
        assert torch.equal(fresh_x, kept)
        lam = ((mixed[0] - carried[0]) * (fresh_x - carried[0])).sum(1) / (fresh_x - carried[0]).square().sum(1)
        assert bool((lam >= 0.5 - 1e-5).all())
        assert bool((lam <= 1 + 1e-5).all())
        assert lam.unique().numel() == 5
        for new, fresh, old in zip(mixed, (fresh_x, fresh_y), carried, strict=True):
            torch.testing.assert_close(new, lam[:, None] * fresh + (1 - lam[:, None]) * old)
        carried = (mixed[0].clone(), mixed[1].clone())


def test_what_happens_in_place_afterwards_is_carried_on() -> None:
    mixup = RunningMixup(0.4, generator())
    first, _ = mixup(torch.ones(2, 4), one_hot(2))
    first.zero_()
    second, _ = mixup(torch.ones(2, 4), one_hot(2))
    assert bool((second < 1).all())


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_mixup_weights_are_beta_distributed(alpha: float) -> None:
    mixup = RunningMixup(alpha, generator())
    mixup(torch.zeros(20000, 1), one_hot(20000))
    lam = mixup(torch.ones(20000, 1), one_hot(20000))[0][:, 0]
    # lam' = max(lam, 1 - lam) keeps lam (1 - lam), whose mean is alpha / (2 (2 alpha + 1))
    assert float((lam * (1 - lam)).mean()) == pytest.approx(alpha / (2 * (2 * alpha + 1)), rel=0.03)


def test_mixup_takes_batches_of_other_sizes_and_resumes() -> None:
    mixup = RunningMixup(0.4, generator())
    mixup(torch.zeros(4, 2), one_hot(4))
    assert mixup(torch.ones(3, 2), one_hot(3))[0].shape == (3, 2)
    larger = mixup(torch.ones(6, 2), one_hot(6))[0]
    assert torch.equal(larger[3:], torch.ones(3, 2))
    other = RunningMixup(0.4, generator())
    other.load_state_dict(mixup.state_dict())
    mixup.generator, other.generator = generator(), generator()
    for a, b in zip(mixup(torch.ones(6, 2), one_hot(6)), other(torch.ones(6, 2), one_hot(6)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(RunningMixup(0.0)(torch.ones(2, 2), one_hot(2))[0], torch.ones(2, 2))


def test_erased_rectangles_have_the_asked_areas_and_aspects() -> None:
    images = torch.ones(4000, 3, 64, 48)
    out = RandomErasing(generator=generator())(images)
    assert out is images
    erased = images[:, 0] == 0
    assert torch.equal(erased, images[:, 2] == 0)
    hit = erased.flatten(1).any(1)
    assert float(hit.float().mean()) == pytest.approx(0.5, abs=0.03)
    rows, columns = erased[hit].any(2).sum(1).float(), erased[hit].any(1).sum(1).float()
    assert torch.equal(erased[hit].sum((1, 2)).float(), rows * columns)  # a whole rectangle, nothing else
    share = rows * columns / (64 * 48)
    assert 0.015 < float(share.min()) < 0.05
    assert 0.2 < float(share.max()) < 0.26
    aspect = torch.minimum(rows, columns) / torch.maximum(rows, columns)
    assert float(aspect.min()) > 0.27
    assert 0.4 < float((rows > columns).float().mean()) < 0.6
    corner = erased[hit]
    assert bool(corner[:, 0].any())
    assert bool(corner[:, -1].any())


def test_erasing_edges() -> None:
    assert torch.equal(RandomErasing(p=0.0)(torch.ones(3, 1, 4, 4)), torch.ones(3, 1, 4, 4))
    tiny = RandomErasing(p=1.0, area=(1.0, 1.0), aspect=(1.0, 1.0))(torch.ones(3, 1, 4, 4))
    assert torch.equal(tiny, torch.zeros(3, 1, 4, 4))
    assert RandomErasing(p=1.0)(torch.ones(0, 1, 4, 4)).shape == (0, 1, 4, 4)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(tc.ConfigurationError, match="alpha"):
        RunningMixup(-1.0)
    with pytest.raises(tc.ConfigurationError, match="one-hot"):
        RunningMixup(1.0)(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(tc.ConfigurationError, match="p and ranges"):
        RandomErasing(p=2.0)
    with pytest.raises(tc.ConfigurationError, match="height"):
        RandomErasing()(torch.ones(3, 4))
