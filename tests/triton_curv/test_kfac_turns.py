"""refresh_budget="even": each layer is renewed once an interval, and steps have about equal work."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

import triton_curv as tc
from tests.support.dense import relative_error
from tests.support.transformer import Transformer, tokens
from triton_curv.blocks.cost import inversion_work
from triton_curv.optimizers.turns import parts_of, turns_of

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Layers of unequal work, with attention, which has a forward of its own while it gives statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 30)
        self.narrow = nn.Linear(30, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        x = self.norm(x + self.attention(x, x, x)[0]).mean(1)
        out: Tensor = self.head(torch.tanh(self.narrow(torch.tanh(self.wide(x)))))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(step: int, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 4, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def train(model: Any, optimizer: tc.KFAC, data: Batch) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()


def folds_of(optimizer: tc.KFAC) -> dict[str, int]:
    return {name: int(block.folds()) for name, block in optimizer.blocks.items()}


def inverses_of(optimizer: tc.KFAC) -> dict[str, list[Tensor]]:
    return {name: [t.clone() for t in block.inverses.values()] for name, block in optimizer.blocks.items()}


def changed(now: list[Tensor], before: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(now, before, strict=True))


def renewals(optimizer: tc.KFAC, model: Any, steps: int) -> tuple[list[set[str]], list[set[str]]]:
    """The blocks whose statistics, and those whose inverses, changed at each step."""
    folded, inverted = [], []
    for step in range(steps):
        folds, inverses = folds_of(optimizer), inverses_of(optimizer)
        train(model, optimizer, batch(step))
        now, then = inverses_of(optimizer), folds_of(optimizer)
        folded.append({name for name in folds if then[name] > folds[name]})
        inverted.append(
            {n for n in now if any(not torch.equal(a, b) for a, b in zip(now[n], inverses[n], strict=True))}
        )
    return folded, inverted


def intervals(schedule: Any, steps: int) -> list[range]:
    """The intervals of a schedule up to a step, by brute force."""
    start, found = 0, []
    while start < steps:
        length = schedule if isinstance(schedule, int) else schedule.interval(start)
        found.append(range(start, start + length))
        start += length
    return found


def longest(work: list[float], parts: list[int]) -> float:
    return max(sum(w for w, p in zip(work, parts, strict=True) if p == part) for part in parts)


def test_parts_are_nearly_as_equal_as_they_can_be() -> None:
    rng = random.Random(0)
    for _ in range(60):
        work = [rng.choice([1.0, 3.0, 10.0, 30.0]) * rng.random() for _ in range(rng.randint(1, 7))]
        most = rng.randint(1, 4)
        parts = parts_of(work, most)
        count = max(parts) + 1
        best = min(longest(work, list(each)) for each in itertools.product(range(count), repeat=len(work)))
        assert longest(work, parts) <= 4 / 3 * best + 1e-12
        if count < most:  # more of them would not make the longest shorter
            assert count >= sum(work) / max(work)
        turns = turns_of(work, 7)
        assert all(0 <= turn < 7 for turn in turns)
    assert parts_of([], 3) == []
    assert parts_of([0.0, 0.0], 3) == [0, 0]
    assert turns_of([1.0] * 20, 20) == list(range(20))


@pytest.mark.parametrize("schedule", [6, tc.GrowingInterval(8)], ids=["fixed", "growing"])
def test_every_layer_has_one_turn_an_interval(schedule: Any) -> None:
    model = net()
    optimizer = tc.KFAC(model, factor_interval=schedule, inverse_interval=schedule, refresh_budget="even")
    steps = 40
    folded, inverted = renewals(optimizer, model, steps)
    every = set(optimizer.blocks)
    assert folded == inverted
    assert folded[0] == every
    parts = 0
    for interval in intervals(schedule, steps):
        inside = [folded[step] for step in interval if step < steps]
        if interval.start == 0 and len(interval) > 1:  # all at the first step, then each as in the others
            assert set().union(*inside[1:]) | {n for n in every if n in folded[len(interval)]} == every
        elif len(inside) == len(interval):
            assert sorted(name for names in inside for name in names) == sorted(every), interval
            parts = max(parts, sum(bool(names) for names in inside))
    work = dict(zip(every, [0.0] * len(every), strict=True))
    for index, (name, block) in enumerate(optimizer.blocks.items()):
        work[name] = float(optimizer._curvature.turns.work[index]) + inversion_work(block.rule)
        assert work[name] > inversion_work(block.rule)
    heaviest, total = max(work.values()), sum(work.values())
    assert parts > 2
    for names in folded[-8:]:
        assert sum(work[name] for name in names) <= heaviest + total / parts


def test_schedules_that_differ_each_have_their_own_turns() -> None:
    model = net()
    optimizer = tc.KFAC(model, factor_interval=4, inverse_interval=7, refresh_budget="even")
    folded, inverted = renewals(optimizer, model, 29)
    for start in (4, 8, 12):
        assert sorted(n for names in folded[start : start + 4] for n in names) == sorted(optimizer.blocks)
    for start in (7, 14, 21):
        assert sorted(n for names in inverted[start : start + 7] for n in names) == sorted(optimizer.blocks)


def test_a_layer_has_the_statistics_of_its_own_turns() -> None:
    """With weights that stay, its averages are those of a run that takes statistics of these batches only."""
    model, steps = net(), 25
    optimizer = tc.KFAC(model, lr=0.0, factor_interval=5, inverse_interval=5, refresh_budget="even")
    folded, _ = renewals(optimizer, model, steps)
    averages = {name: block.factors() for name, block in optimizer.blocks.items()}
    shared: dict[tuple[int, ...], set[str]] = {}
    for name in averages:
        shared.setdefault(tuple(step for step in range(steps) if name in folded[step]), set()).add(name)
    assert len(shared) > 2
    for turns, names in shared.items():
        plain = net()
        reference = tc.KFAC(plain, lr=0.0, factor_interval=1, inverse_interval=1)
        for step in turns:
            train(plain, reference, batch(step))
        for name in names:
            for factor, value in reference.blocks[name].factors().items():
                torch.testing.assert_close(averages[name][factor], value, rtol=1e-10, atol=1e-12)


def test_micro_batches_of_a_turn_add_up() -> None:
    results = []
    for pieces in (1, 2):
        model = net()
        optimizer = tc.KFAC(model, factor_interval=4, inverse_interval=4, refresh_budget="even")
        for step in range(10):
            x, y = batch(step)
            optimizer.zero_grad()
            for part, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                (functional.cross_entropy(model(part), target) / pieces).backward()
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_taps_of_layers_whose_turn_it_is_not_do_nothing() -> None:
    model = net()
    optimizer = tc.KFAC(model, factor_interval=5, inverse_interval=5, refresh_budget="even")
    seen = []
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        counts = optimizer._store.counts[:, 0]
        seen.append({name for name, block in optimizer.blocks.items() if counts[block.index] > 0})
        optimizer.step()
    assert seen[0] == set(optimizer.blocks)
    assert all(len(names) < len(optimizer.blocks) for names in seen[1:])
    assert sorted(n for names in seen[5:] for n in names) == sorted(optimizer.blocks)


def test_statistics_that_were_asked_for_are_folded_for_all_layers() -> None:
    model = net()
    optimizer = tc.KFAC(model, factor_interval=5, inverse_interval=5, refresh_budget="even")
    for step in range(7):
        train(model, optimizer, batch(step))
    before = folds_of(optimizer)
    optimizer.capture(True)
    x, y = batch(7)
    functional.cross_entropy(model(x), y).backward()  # pending, until the next turn of any layer
    optimizer.capture(False)
    for step in range(8, 15):
        optimizer.step() if step == 8 else train(model, optimizer, batch(step))
    turns = optimizer._curvature.turns.turns("fold", 5)
    own = {name: 1 + (turn >= 3) for name, turn in zip(before, turns, strict=True)}  # of steps 8, 9 and 10 to 14
    extra = {name: after - before[name] for name, after in folds_of(optimizer).items()}
    assert all(extra[name] in (own[name], own[name] + 1) for name in own), (extra, own)
    assert any(extra[name] > 1 for name in own if turns[list(own).index(name)] < 3)
    assert not optimizer._store.counts.any()


class Late(nn.Module):
    """A layer that is used from some step on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.used = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.mean(1)))
        out: Tensor = self.last(torch.tanh(self.late(x)) if self.used else x)
        return out


def test_a_layer_that_is_used_later_waits_for_its_turn() -> None:
    torch.manual_seed(0)
    model = Late().double()
    optimizer = tc.KFAC(model, factor_interval=4, inverse_interval=4, refresh_budget="even")
    for step in range(12):
        model.used = step >= 5
        train(model, optimizer, batch(step))
    assert all(folds_of(optimizer).values())
    assert all(p.isfinite().all() for p in model.parameters())


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def test_under_a_compiled_model_statistics_stay_together() -> None:
    torch._dynamo.reset()
    model = small()
    optimizer = tc.KFAC(model, factor_interval=4, inverse_interval=4, refresh_budget="even")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert "one step" not in str(optimizer.explain())
    folded, inverted = renewals(optimizer, compiled, 13)
    every = sorted(optimizer.blocks)
    assert [sorted(names) for names in folded] == [every, [], [], [], every, [], [], [], every, [], [], [], every]
    assert sorted(n for names in inverted[4:8] for n in names) == every
    assert all(len(names) < 2 for names in inverted[4:])
    assert counter.frame_count == 2, "one graph with taps and one without"
    assert "statistics of all layers in one step: the model is compiled" in str(optimizer.explain())
    resumed = tc.KFAC(model, factor_interval=4, inverse_interval=4, refresh_budget="even")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed._curvature.wanted(14) is False, "what is compiled is known before the first forward"
    torch._dynamo.reset()


def test_in_a_compiled_step_nothing_takes_turns() -> None:
    torch._dynamo.reset()
    model = small()
    optimizer = tc.KFAC(model, factor_interval=3, inverse_interval=3, refresh_budget="even", update_size="none")
    take_step = torch.compile(optimizer.step, backend="eager")
    renewed = []
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        before, folds = inverses_of(optimizer), folds_of(optimizer)
        take_step()
        now = inverses_of(optimizer)
        new = sum(changed(now[name], before[name]) for name in now)
        renewed.append((sum(folds_of(optimizer).values()) - sum(folds.values()), new))
    assert renewed == [(2, 2), (0, 0), (0, 0), (2, 2), (0, 0)]
    assert "all layers at once" in str(optimizer.explain())
    torch._dynamo.reset()


def test_a_sampled_fisher_takes_its_passes_in_one_step() -> None:
    model = net()
    optimizer = tc.KFAC(model, factor_interval=4, inverse_interval=4, refresh_budget="even", fisher="sampled")
    inverted, needed = [], []
    for step in range(12):
        x, y = batch(step)
        before = inverses_of(optimizer)
        needed.append(optimizer._switch.enabled)
        optimizer.zero_grad()
        output = model(x)
        optimizer.sample_fisher(output, "cross_entropy")
        functional.cross_entropy(output, y).backward()
        optimizer.step()
        now = inverses_of(optimizer)
        inverted.append({name for name in now if changed(now[name], before[name])})
    assert [step for step, is_needed in enumerate(needed) if is_needed] == [0, 4, 8]
    assert sorted(n for names in inverted[4:8] for n in names) == sorted(optimizer.blocks)
    assert max(len(names) for names in inverted[4:]) < len(optimizer.blocks)
    assert "fisher='sampled'" in str(optimizer.explain())


def token_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


def amp_run(dtype: torch.dtype, overflows: set[int], steps: int) -> tuple[tc.KFAC, list[set[str]]]:
    """Mixed precision in two micro-batches, with a scale that grows at every second step; folds of each step."""
    torch.manual_seed(0)
    model = Transformer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11, growth_interval=2)
    optimizer = tc.KFAC(
        model, lr=0.0, factor_interval=4, inverse_interval=4, refresh_budget="even", centred=False, grad_scaler=scaler
    )
    folded: list[set[str]] = []
    for attempt in range(steps + len(overflows)):
        step = len(folded)
        x, y = tokens(16, 6, seed=step)
        optimizer.zero_grad()
        before = folds_of(optimizer)
        for part, target in zip(x.chunk(2), y.chunk(2), strict=True):
            with torch.autocast("cpu", dtype):
                loss = token_loss(model(part), target) / 2
            scaler.scale(loss * float("inf") if attempt in overflows else loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        now = {name for name, folds in folds_of(optimizer).items() if folds > before[name]}
        if attempt in overflows:
            assert not now
            assert optimizer.param_groups[0]["step"] == step
        else:
            folded.append(now)
    return optimizer, folded


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_turns_in_mixed_precision(dtype: torch.dtype, tolerance: float) -> None:
    """A step that a GradScaler leaves out takes nobody's turn; averages are those of float64 on the turns' batches."""
    steps = 13
    optimizer, folded = amp_run(dtype, {0, 2, 7}, steps)
    every = sorted(optimizer.blocks)
    for start in (4, 8):
        assert sorted(name for names in folded[start : start + 4] for name in names) == every
    assert optimizer.health()["optimizer"]["discarded_statistics"] == 0
    shared: dict[tuple[int, ...], list[str]] = {}
    for name in every:
        if name != "place":  # one row for each place, not for each sample of a micro-batch
            shared.setdefault(tuple(step for step in range(steps) if name in folded[step]), []).append(name)
    assert len(shared) > 2
    for turns, names in shared.items():
        torch.manual_seed(0)
        plain = Transformer().double()
        reference = tc.KFAC(plain, lr=0.0, factor_interval=1, inverse_interval=1, centred=False)
        for step in turns:
            x, y = tokens(16, 6, seed=step)
            reference.zero_grad()
            token_loss(plain(x), y).backward()
            reference.step()
        for name in names:
            for factor, value in reference.blocks[name].factors().items():
                found = optimizer.blocks[name].factors()[factor].double()
                assert relative_error(found, value) < tolerance, (name, factor)
