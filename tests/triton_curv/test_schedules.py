"""Refresh schedules, polynomial decay with tied momentum, damping rules, weights rescaling, and the recipe."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import triton_curv as tc
from tests.support.small_net import batches, small_net, train, weights
from triton_curv.blocks.operator import solve
from triton_curv.recipes import OSAWA, osawa2019
from triton_curv.schedules import FixedInterval, osawa_growing, osawa_two_phases

# ---- when statistics are refreshed


def fold_steps(optimizer: tc.KFAC, model: nn.Module, steps: int) -> list[int]:
    """Steps at which the first block's A was folded."""
    done = []
    for step, batch in enumerate(batches(steps)):
        before = optimizer.state[model.get_parameter("0.weight")]["A_folds"].clone()
        train(model, optimizer, [batch])
        if not torch.equal(before, optimizer.state[model.get_parameter("0.weight")]["A_folds"]):
            done.append(step)
    return done


def test_fixed_and_epoch_intervals() -> None:
    assert [FixedInterval(4).interval(s) for s in (0, 1, 3, 4)] == [4, 3, 1, 4]
    assert [osawa_growing(e) for e in (0, 4, 5, 10, 15, 20, 99)] == [1, 1, 6, 11, 16, 20, 20]
    assert [osawa_two_phases(e) for e in (0, 12, 13, 99)] == [1, 1, 20, 20]
    model = small_net()
    assert fold_steps(tc.KFAC(model, lr=1e-3, factor_interval=4), model, 10) == [0, 4, 8]
    model = small_net()
    rule = tc.EpochInterval(2, lambda epoch: 1 + epoch)  # steps 0-1 every step, 2-3 every 2nd, 4-5 every 3rd
    assert fold_steps(tc.KFAC(model, lr=1e-3, factor_interval=rule), model, 10) == [0, 1, 2, 4, 7]


def test_adaptive_rule_of_sp_ngd() -> None:
    rule = tc.AdaptiveInterval()
    assert rule.next(8, 5, similar_to_last=False, similar_to_before=True) == 4
    assert rule.next(1, 1, similar_to_last=False, similar_to_before=False) == 1
    assert rule.next(8, 5, similar_to_last=True, similar_to_before=False) == 8
    assert rule.next(8, 5, similar_to_last=True, similar_to_before=True) == 13
    assert tc.AdaptiveInterval(most=10).next(8, 5, similar_to_last=True, similar_to_before=True) == 10


def test_adaptive_intervals_grow_like_fibonacci_on_a_constant_statistic() -> None:
    """One batch again and again at lr 0: X is similar from the second fold on, to both from the third."""
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.0, factor_interval=tc.AdaptiveInterval(), factor_decay=0.0)
    key = model.get_parameter("0.weight")
    done = []
    for step, batch in enumerate(batches(1) * 30):
        before = optimizer.state[key]["A_refresh"].clone()
        train(model, optimizer, [batch])
        if not torch.equal(before, optimizer.state[key]["A_refresh"]):
            done.append(step)
    assert [b - a for a, b in itertools.pairwise(done)][:6] == [1, 1, 2, 3, 5, 8]


def test_adaptive_rule_goes_by_each_statistic() -> None:
    """Inputs stay, gradients change sign and size: A of the first layer is refreshed less and less, G at every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = tc.KFAC(model, lr=0.0, factor_interval=tc.AdaptiveInterval(), factor_decay=0.0)
    x = torch.randn(6, 4)
    intervals: dict[str, list[int]] = {"A": [], "G": []}
    for step in range(12):
        optimizer.zero_grad()
        (model(x) * torch.randn(6, 3) * 3.0**step).sum().backward()
        optimizer.step()
        for name, kept in intervals.items():
            kept.append(int(optimizer.state[model.get_parameter("0.weight")][f"{name}_refresh"][1]))
    assert intervals["A"][-1] > 3
    assert set(intervals["G"]) == {1}


def sp_ngd_refreshes(statistics: list[Tensor], alpha: float) -> list[int]:
    """Steps at which algorithms 1 and 2 of arXiv 2002.06015 renew a statistic that would be `statistics[t]` at t."""

    def similar(X: Tensor, Y: Tensor | None) -> bool:
        return Y is not None and float((X - Y).norm()) < alpha * float(Y.norm())

    refreshes, due = [], 0
    delta_1, delta_2 = 1, 1
    X_1: Tensor | None = None
    X_2: Tensor | None = None
    for t, X in enumerate(statistics):
        if t != due:
            continue
        refreshes.append(t)
        if not similar(X, X_1):
            delta = max(1, delta_1 // 2)
        elif not similar(X, X_2):
            delta = delta_1
        else:
            delta = delta_1 + delta_2
        delta_1, delta_2 = delta, delta_1
        due = t + delta
        X_1, X_2 = X, X_1
    return refreshes


def test_adaptive_refreshes_are_those_of_the_published_algorithm() -> None:
    """Inputs and gradients change at chosen steps: calm, a jump, calm, a slow drift, and A and G not together."""
    generator = torch.Generator().manual_seed(0)
    x, signal = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    sizes_A = [1.0] * 14 + [2.0] * 22 + [2.0 * 1.03**t for t in range(14)] + [4.0] * 10
    sizes_G = [1.0 + 0.02 * (t % 2) for t in range(25)] + [3.0] * 5 + [1.0] * 30
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    optimizer = tc.KFAC(model, lr=0.0, factor_interval=tc.AdaptiveInterval(0.1), factor_decay=0.0, damping=0.1)
    state = optimizer.state[model.get_parameter("0.weight")]
    seen: dict[str, list[int]] = {"A": [], "G": []}
    statistics: dict[str, list[Tensor]] = {"A": [], "G": []}
    for step, (a, g) in enumerate(zip(sizes_A, sizes_G, strict=True)):
        optimizer.zero_grad()
        before = {name: state[f"{name}_refresh"].clone() for name in seen}
        inverses = {name: state[f"{name}_inverse"].clone() for name in seen}
        (model(a * x) * g * signal).sum().div(8).backward()
        optimizer.step()
        statistics["A"].append((a * x).T @ (a * x) / 8)
        statistics["G"].append((g * signal).T @ (g * signal) / 8)
        for name, steps in seen.items():
            if not torch.equal(before[name], state[f"{name}_refresh"]):
                steps.append(step)
            elif before["A"][0] != step and before["G"][0] != step:
                assert torch.equal(inverses[name], state[f"{name}_inverse"])  # the stale inverse serves
    for name, steps in seen.items():
        assert steps == sp_ngd_refreshes(statistics[name], 0.1)
        assert len(steps) < 40
    assert seen["A"] != seen["G"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: FixedInterval(0),
        lambda: tc.EpochInterval(0),
        lambda: tc.EpochInterval(1, lambda e: 0).interval(3),
        lambda: tc.AdaptiveInterval(alpha=0.0),
        lambda: tc.WarmupDamping(0.5, 10),
        lambda: tc.WarmupDamping(100.0, 3),
        lambda: tc.LevenbergMarquardt(interval=0),
        lambda: tc.LevenbergMarquardt(poor=0.9),
        lambda: tc.ScheduledDamping(lambda step: -1.0).factor(0),
        lambda: osawa2019(1000),
        lambda: tc.PolynomialDecay(
            torch.optim.SGD([nn.Parameter(torch.zeros(1))]), power=1.0, start=2, end=1, steps_per_epoch=1
        ),
    ],
)
def test_bad_schedules_are_named(build: Any) -> None:
    with pytest.raises(tc.ConfigurationError, match="expected"):
        build()


# ---- learning rate and momentum


@pytest.mark.parametrize("form", ["paper", "code"])
def test_polynomial_decay_moves_weights_as_the_published_update(form: Any) -> None:
    """w_{t+1} = w_t - eta_t P_t + m_t (w_t - w_{t-1}), m_t = m0 eta_t / eta0 (paper) or m0 eta_t / eta_{t-1} (code)."""
    model = small_net().double()
    eta0, m0 = 0.05, 0.9
    optimizer = tc.KFAC(
        model, lr=eta0, momentum=m0, update_size="none", damping=0.3, factor_interval=1, inverse_interval=1
    )
    schedule = tc.PolynomialDecay(optimizer, power=2.0, start=0.5, end=3.0, steps_per_epoch=2, momentum=form)

    def eta(t: int) -> float:
        return eta0 * (1 - max(0.0, t / 2 - 0.5) / 2.5) ** 2

    velocity = {p: torch.zeros_like(p) for p in model.parameters()}
    for t, (x, y) in enumerate(batches(6)):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(eta(t))
        optimizer.zero_grad()
        functional.cross_entropy(model(x.double()), y).backward()
        before = {p: p.detach().clone() for p in model.parameters()}
        optimizer.step()
        schedule.step()
        for block in optimizer.blocks.values():
            params = block.rule.params
            solved = block.precondition({k: p.grad for k, p in params.items() if p.grad is not None})
            for k, p in params.items():
                m = m0 * eta(t) / (eta0 if form == "paper" else eta(max(t - 1, 0)))
                velocity[p] = m * velocity[p] - eta(t) * solved[k]
                torch.testing.assert_close(p.detach(), before[p] + velocity[p], rtol=1e-9, atol=1e-12)


def test_decay_resumes() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.1)
    schedule = tc.PolynomialDecay(optimizer, power=2.0, start=0, end=10, steps_per_epoch=1)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    other = tc.KFAC(small_net(), lr=0.1)
    resumed = tc.PolynomialDecay(other, power=2.0, start=0, end=10, steps_per_epoch=1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(schedule.state_dict())
    for scheduler in (schedule, resumed):
        scheduler.optimizer.step()
        scheduler.step()
    for key in ("lr", "momentum"):
        assert optimizer.param_groups[0][key] == other.param_groups[0][key]


# ---- damping


def test_warmup_reaches_its_target() -> None:
    rule = tc.WarmupDamping(ratio=100.0, steps=40)
    alpha, damping = 2 * math.log10(100.0) / 40, 100.0
    for step in range(60):
        assert rule.factor(step) == pytest.approx(damping)
        damping = (1 - alpha) * damping + alpha
    assert rule.factor(400) == pytest.approx(1.0)


@pytest.mark.parametrize("ratio", [-1.0, 0.1, 0.25, 0.5, 0.75, 0.9, math.nan])
def test_levenberg_marquardt_is_the_trust_region_of_sgn(ratio: float) -> None:
    damping = torch.tensor(1e-4, dtype=torch.float64)
    rule = tc.LevenbergMarquardt(least=1e-6)
    factor = 2 / 3 if ratio > 3 / 4 else 1.0 if ratio >= 1 / 4 else 3 / 2  # NaN compares as False
    actual = rule.adapt(damping, torch.tensor(ratio, dtype=torch.float64))
    torch.testing.assert_close(actual, factor * damping, rtol=1e-15, atol=0)


def dense_times(block: Any, matrix: Tensor, damping: float) -> Tensor:
    """(G + s_G) D (A + s_A) from the dense factors the user sees."""
    factors = block.factors()
    A, G = (f if f.dim() == 3 else f[None] for f in (factors["A"], factors["G"]))
    pi = (A.diagonal(dim1=1, dim2=2).mean() / G.diagonal(dim1=1, dim2=2).mean()).sqrt()
    eye_A, eye_G = (torch.eye(f.shape[-1], dtype=f.dtype) for f in (A, G))
    product: Tensor = (G + damping**0.5 / pi * eye_G) @ matrix @ (A + damping**0.5 * pi * eye_A)
    return product


def test_a_step_on_the_models_own_minimum_has_ratio_one() -> None:
    """Least squares by one linear layer: with the Fisher G scaled to the Hessian, prediction and change agree."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    seen: list[Tensor] = []

    class Spy(tc.LevenbergMarquardt):
        def adapt(self, damping: Tensor, ratio: Tensor) -> Tensor:
            seen.append(ratio)
            return super().adapt(damping, ratio)

    optimizer = tc.KFAC(
        model, lr=0.5, momentum=0.0, update_size="none", damping=1e-12, fisher="exact", damping_rule=Spy(interval=1)
    )
    output = model(x)
    optimizer.sample_fisher(output, "mse")
    functional.mse_loss(output, y).backward()
    optimizer.step(evaluate=lambda: functional.mse_loss(model(x), y))
    assert float(seen[0]) == pytest.approx(1.0, rel=1e-5)
    assert optimizer.health()["optimizer"]["damping_gain"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_damped_product_undoes_precondition(inverse: Any) -> None:
    from triton_curv.optimizers.trial import damped_product

    model = small_net().double()
    optimizer = tc.KFAC(model, lr=0.0, damping=0.01, inverse=inverse)
    train(model, optimizer, [(x.double(), y) for x, y in batches(1)])
    for block in optimizer.blocks.values():
        matrix = torch.randn(block.rule.matrix_shape, dtype=torch.float64)
        out = torch.empty_like(matrix)
        solve(block.operator, matrix, out)
        torch.testing.assert_close(damped_product(block, out), matrix, rtol=1e-8, atol=1e-8)
    block = optimizer.blocks["4"]
    if inverse == "cholesky":
        matrix = torch.randn(block.rule.matrix_shape, dtype=torch.float64)
        torch.testing.assert_close(damped_product(block, matrix), dense_times(block, matrix, 0.01))


def test_rejected_steps_are_taken_back_and_damping_grows() -> None:
    model = nn.Sequential(small_net(), nn.LayerNorm(3))
    rule = tc.LevenbergMarquardt(interval=1, reject=True)
    optimizer = tc.KFAC(model, lr=0.01, damping_rule=rule)
    x, y = batches(1)[0]

    def loss() -> Tensor:
        return functional.cross_entropy(model(x), y)

    for lr in (0.01, 0.01, 50.0):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss().backward()
        before, buffers = weights(model), [b.clone() for b in model.buffers()]
        momenta = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        gain = optimizer.health()["optimizer"]["damping_gain"]
        optimizer.step(evaluate=loss)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    for p, state in momenta.items():
        for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            assert name not in state or torch.equal(state[name], optimizer.state[p][name])
    assert optimizer.health()["optimizer"]["rejected_steps"] == 1
    assert optimizer.health()["optimizer"]["damping_gain"] == pytest.approx(1.5 * gain)
    with pytest.raises(tc.ConfigurationError, match="evaluate"):
        optimizer.step()


def test_groups_keep_their_ratio_of_damping_under_a_rule() -> None:
    model = small_net()
    optimizer = tc.KFAC(
        model,
        lr=0.0,
        damping=0.01,
        groups=[{"modules": "1", "damping": 0.16}],
        damping_rule=tc.ScheduledDamping(lambda step: 10.0),
    )
    train(model, optimizer, batches(1))
    assert torch.allclose(optimizer.state[model.get_parameter("1.weight")]["F_shift"], torch.tensor(1.6))
    linear = optimizer.state[model.get_parameter("4.weight")]
    torch.testing.assert_close(linear["A_shift"] * linear["G_shift"], torch.tensor([0.1]))


# ---- rescaling


@pytest.mark.parametrize("how", ["paper", "code"])
def test_weights_are_rescaled_after_the_step(how: Any) -> None:
    model = small_net()
    with torch.no_grad():
        model.get_parameter("4.weight").mul_(100.0)
    plain = copy.deepcopy(model)
    train(model, tc.KFAC(model, lr=0.01, rescale=how), batches(1))
    train(plain, tc.KFAC(plain, lr=0.01), batches(1))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        target = math.sqrt(2 * len(q))
        scaled = p.dim() > 1 and (how == "paper" or float(q.norm()) > target)
        torch.testing.assert_close(p, q * (target / (q.norm() + 1e-9)) if scaled else q, msg=name)


class Mixed(nn.Module):
    """Layers that weights rescaling is not meant for, and linear ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.up = nn.ConvTranspose1d(6, 3, 2)
        self.norm = nn.LayerNorm((3, 5))
        self.attention = nn.MultiheadAttention(5, 1)
        self.head = nn.Linear(15, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.up(self.embed(tokens).mT))
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))
        return out


def test_rescaling_is_for_linear_and_convolutional_weights_alone() -> None:
    model = Mixed()
    tokens, y = torch.randint(0, 10, (7, 4)), torch.randint(0, 2, (7,))
    names = ("embed.weight", "up.weight", "norm.weight", "attention.in_proj_weight")
    plain = Mixed()
    for net, rescale in ((model, "paper"), (plain, "none")):
        optimizer = tc.KFAC(net, lr=0.01, rescale=rescale)  # type: ignore[arg-type]  # a literal, in a loop
        functional.cross_entropy(net(tokens), y).backward()
        optimizer.step()
    for name in names:
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))
    for name, width in (("attention.out_proj.weight", 5), ("head.weight", 2)):
        assert float(model.get_parameter(name).detach().norm()) == pytest.approx(math.sqrt(2 * width), rel=1e-5)


# ---- the recipe


PUBLISHED = """
    4096    0.4  11.0  1    53    8.18e-3  0.997  2.5e-4  10948  74.8
    8192    0.4  8.0   1    53.5  1.25e-2  0.993  2.5e-4  5434   75.3
    16384   0.4  8.0   1    53.5  2.5e-2   0.985  2.5e-4  2737   75.2
    32768   0.6  3.5   1.5  49.5  3.0e-2   0.97   2.0e-4  1760   75.4
    65536   0.6  2.9   2    64.5  4.0e-2   0.95   1.5e-4  1173   75.6
    131072  1.0  2.9   3    100   7.0e-2   0.93   1.0e-4  873    74.9
"""  # arXiv 2002.06015, Table 2: batch, alpha_mixup, p_decay, e_start, e_end, eta_0, m_0, lambda, steps, top-1


def test_recipe_holds_the_published_table() -> None:
    lines = [[float(cell) for cell in line.split()] for line in PUBLISHED.split("\n") if line.strip()]
    assert {int(batch): list(row) for batch, *row in lines} == {batch: list(row) for batch, row in OSAWA.items()}
    for batch, alpha, power, start, end, lr, momentum, damping, _, _ in lines:
        recipe = osawa2019(int(batch))
        optimizer = recipe.optimizer(small_net())
        schedule = recipe.schedule(optimizer)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["momentum"], group["damping"]) == (lr, momentum, damping)
        assert (schedule.power, schedule.start, schedule.end) == (power, start, end)
        assert recipe.mixup().alpha == alpha


def test_recipe_marks_what_is_ours() -> None:
    recipe = osawa2019(4096)
    assert sorted(OSAWA) == [4096 * 2**k for k in range(6)]
    assert recipe.steps_per_epoch == 313
    assert recipe.steps_per_epoch * 35 == pytest.approx(recipe.table.steps, rel=0.01)
    assert not any("BN damping" in key for key in recipe.ours)
    older = osawa2019(32768, stale="epoch", warmup_damping=True)
    assert {"BN damping multiplier", "warm-up steps", "first damping", "osawa_growing"} <= set(older.ours)


def test_recipe_takes_whole_factors() -> None:
    assert "G 1x100x100" in str(osawa2019(4096).optimizer(nn.Linear(3, 100)).explain())


@pytest.mark.parametrize("stale", ["none", "epoch", "adaptive"])
@pytest.mark.parametrize("warmup", [False, True])
def test_recipe_trains(stale: Any, warmup: bool) -> None:
    model = small_net()
    recipe = osawa2019(131072, samples=131072 * 5, stale=stale, warmup_damping=warmup)
    optimizer = recipe.optimizer(model, lr=0.02, damping=0.1)
    schedule = recipe.schedule(optimizer)
    losses = []
    mixup, erasing = recipe.mixup(), recipe.erasing()
    for x, y in batches(1) * 12:
        inputs, targets = mixup(x, functional.one_hot(y, 3).float())
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(erasing(inputs)), targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(value) for value in losses)
    norms = [float(p.norm()) for p in model.parameters() if p.dim() > 1]
    targets_of = [math.sqrt(2 * len(p)) for p in model.parameters() if p.dim() > 1]
    assert norms == pytest.approx(targets_of, rel=1e-4)
    if warmup:
        assert optimizer.param_groups[0]["damping"] == recipe.norm_damping == 16 * 1e-4
