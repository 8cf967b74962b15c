"""What KFAC does where nothing is said: matched steps that shrink as they disagree, centred G, growing intervals."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import triton_curv as tc
from tests.support.small_net import batches, small_net, train
from triton_curv.blocks.bank import Held
from triton_curv.blocks.centre import MOST


def test_matched_steps_change_narrow_and_wide_layers_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 399), nn.Tanh(), nn.Linear(399, 3))
    optimizer = tc.KFAC(model, lr=0.01, momentum=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    functional.mse_loss(model(torch.randn(16, 7)), torch.randn(16, 3)).backward()
    optimizer.step()
    moved = [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
    for parts, columns in ((moved[:2], 8), (moved[2:], 400)):
        rms = torch.cat(parts).square().mean().sqrt()
        torch.testing.assert_close(rms, torch.tensor(0.01 * (64 / columns) ** 0.5), rtol=1e-4, atol=0.0)


def test_matched_momentum_is_an_average_whose_length_scales_the_rate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    optimizer = tc.KFAC(model, lr=0.1, momentum=0.7, weight_decay=0.5)
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}
    agreement = 1.0
    for k in range(1, 5):
        optimizer.zero_grad()
        functional.mse_loss(model(torch.randn(9, 5).double()), torch.randn(9, 4).double()).backward()
        before = {p: p.detach().clone() for p in model.parameters()}
        optimizer.step()
        lengths = []
        for block in optimizer.blocks.values():
            solved = block.precondition({n: p.grad for n, p in block.rule.params.items() if p.grad is not None})
            columns = block.rule.matrix_shape[2]
            size = (64 / columns) ** 0.5
            rms = torch.cat([s.flatten() for s in solved.values()]).square().mean().sqrt() / size
            for n, p in block.rule.params.items():
                buffers[p] = 0.7 * buffers[p] + 0.3 * solved[n] / rms
                step = (0.7 * buffers[p] + 0.3 * solved[n] / rms) / (1 - 0.7 ** (k + 1))
                torch.testing.assert_close(
                    p.detach(), (1 - 0.05) * before[p] - 0.1 * agreement * step, rtol=1e-9, atol=1e-12
                )
            average = torch.cat([buffers[p].flatten() for p in block.rule.params.values()])
            lengths.append(float(average.square().mean().sqrt()) / size / (1 - 0.7**k))
        agreement = min(1.0, sum(lengths) / len(lengths))
        assert agreement > 0.99 if k == 1 else agreement < 0.95


@pytest.mark.parametrize("kind", ["linear", "sequence", "conv", "grouped", "summed", "micro-batches"])
def test_centred_factor_is_the_covariance_of_output_gradients(kind: str) -> None:
    torch.manual_seed(1)
    groups = 2 if kind == "grouped" else 1
    if kind in ("conv", "grouped"):
        layer: nn.Module = nn.Conv2d(2, 4, 3, groups=groups)
        x = torch.randn(6, 2, 5, 5)
    else:
        layer, x = nn.Linear(3, 4), torch.randn((6, 5, 3) if kind == "sequence" else (6, 3))
    model, x = nn.Sequential(layer, nn.Tanh()).double(), x.double()
    optimizer = tc.KFAC(model, reduction="sum" if kind == "summed" else "mean")
    output: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, out: output.append(out))
    parts = x.split(2) if kind == "micro-batches" else (x,)
    rows = []
    for part in parts:
        losses = (model(part) - 1.5).square().flatten(1).sum(1)
        (losses.sum() if kind == "summed" else losses.sum() / len(x)).backward(retain_graph=True)
        (grad,) = torch.autograd.grad(losses.sum(), output[-1])
        grad = grad.movedim(1, -1) if isinstance(layer, nn.Conv2d) else grad
        rows.append(grad.reshape(len(part), -1, grad.shape[-1]))
    g = torch.cat(rows)
    positions = g.shape[1]
    deviations = (g - g.mean((0, 1))).reshape(-1, groups, 4 // groups).transpose(0, 1)
    expected = deviations.mT @ deviations / (len(x) * positions) * positions
    pending = optimizer.blocks["0"].factors()["G"].reshape(expected.shape)
    torch.testing.assert_close(pending, expected)
    optimizer.step()
    torch.testing.assert_close(optimizer.blocks["0"].factors()["G"].reshape(expected.shape), expected)


@pytest.mark.parametrize("unscaled", [False, True], ids=["by step", "before"])
def test_gradients_of_a_grad_scaler_centre_by_their_own_scale(unscaled: bool) -> None:
    x, found = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=1, enabled=enabled)
        optimizer = tc.KFAC(model, lr=0.0, factor_interval=1, inverse_interval=1, grad_scaler=scaler)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale((model(x) - 1.5).square().sum(1).mean()).backward()
            if unscaled:
                scaler.unscale_(optimizer)
                before = optimizer.blocks["0"].factors()["G"]
            scaler.step(optimizer)
            scaler.update()
            found.append(optimizer.blocks["0"].factors()["G"])
            if unscaled:
                torch.testing.assert_close(before, found[-1])
    for plain, scaled in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "grouped"])
def test_samples_that_are_all_alike_keep_the_scale_and_direction_of_their_curvature(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 1, groups=2) if kind == "grouped" else nn.Linear(4, 6)
    sample = (torch.randn(1, 4, 1) if kind == "grouped" else torch.randn(1, 4)).double()
    model = nn.Sequential(layer, nn.Flatten()).double()
    g = 2 * model(sample).detach()[0]
    parts = g.reshape({"diagonal": (6, 1), "dense": (1, 6), "grouped": (2, 3)}[kind])
    expected = (parts[:, :, None] * parts[:, None, :] * (1 - MOST)).squeeze()
    for copies in (1, 3):
        twin = deepcopy(model)
        optimizer = tc.KFAC(twin, max_output_dim=4 if kind == "diagonal" else 64)
        twin(sample.expand(copies, *sample.shape[1:])).square().sum(1).mean().backward()
        torch.testing.assert_close(optimizer.blocks["0"].factors()["G"].squeeze(), expected, rtol=1e-9, atol=1e-12)
        optimizer.step()
        torch.testing.assert_close(optimizer.blocks["0"].factors()["G"].squeeze(), expected, rtol=1e-9, atol=1e-12)


def test_batches_of_one_sample_step_as_without_centring() -> None:
    trained = []
    for centred in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
        x, y = torch.randn(32, 6).double(), torch.randint(3, (32,))
        optimizer = tc.KFAC(model, centred=centred, factor_interval=2, inverse_interval=2)
        for row in range(32):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[row : row + 1]), y[row : row + 1]).backward()
            optimizer.step()
        health = optimizer.health()["optimizer"]
        assert health["failed_inverses"] == health["skipped_steps"] == 0
        trained.append(next(model.parameters()).detach())
    torch.testing.assert_close(*trained, rtol=1e-6, atol=1e-9)


def test_centring_is_left_out_with_an_absolute_damping_or_another_fisher() -> None:
    assert tc.KFAC(nn.Linear(3, 2)).options.centred
    assert not tc.KFAC(nn.Linear(3, 2), damping=0.1).options.centred
    assert not tc.KFAC(nn.Linear(3, 2), fisher="sampled").options.centred
    with pytest.raises(tc.ConfigurationError, match="centred"):
        tc.KFAC(nn.Linear(3, 2), fisher="sampled", centred=True)


def test_a_gradient_that_is_not_finite_leaves_no_trace_in_factors() -> None:
    model = nn.Linear(3, 2)
    optimizer = tc.KFAC(model, factor_interval=1)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    before = optimizer.blocks[""].factors()["G"]
    optimizer.zero_grad()
    (model(torch.randn(4, 3)).square().mean() * torch.nan).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.blocks[""].factors()["G"], before)


def test_statistics_grow_old_as_training_does() -> None:
    rule = tc.GrowingInterval(20)
    at, steps = [], 0
    while steps < 100:
        at.append(steps)
        steps += rule.interval(steps)
    assert at == [0, 1, 2, 4, 8, 16, 32, 52, 72, 92]
    with pytest.raises(tc.ConfigurationError):
        tc.GrowingInterval(0)
    model = small_net()
    losses = train(model, tc.KFAC(model), batches(1) * 30)
    assert losses[-1] < 0.05 * losses[0]


def test_a_rank_shows_averages_alone_before_pending_statistics_are_known_together() -> None:
    model = nn.Linear(3, 2)
    optimizer = tc.KFAC(model, factor_interval=1)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    before = optimizer.blocks[""].factors()["G"]
    model(torch.randn(4, 3)).square().mean().backward()
    keys = frozenset(optimizer._store.keys)
    optimizer._store.held = Held(keys, keys, {})  # as where there are several ranks
    torch.testing.assert_close(optimizer.blocks[""].factors()["G"], before, rtol=0, atol=0)
