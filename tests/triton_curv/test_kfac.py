"""KFAC as a torch optimizer: state, schedules, groups, coverage, failures. Its mathematics: test_kfac_exact."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import triton_curv as tc
from triton_curv.optimizers.kfac import UpdateSize

Batch = tuple[Tensor, Tensor]


def small_net(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=inplace),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.ReLU(inplace=inplace),
        nn.Linear(8, 3),
    )


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 1, 4, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator))
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch]) -> list[float]:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("update_size", ["rms", "kl_clip", "none"])
def test_training_lowers_the_loss(update_size: UpdateSize) -> None:
    model = small_net()
    lr, damping = {"rms": (1e-2, None), "kl_clip": (0.05, None), "none": (0.02, 0.1)}[update_size]
    optimizer = tc.KFAC(model, lr=lr, damping=damping, update_size=update_size)
    losses = train(model, optimizer, batches(1) * 40)
    assert losses[-1] < 0.1 * losses[0]


def test_rms_step_has_the_size_of_lr() -> None:
    model = small_net()
    before = weights(model)
    train(model, tc.KFAC(model, lr=0.01, momentum=0.0), batches(1))
    moved = [b - a for a, b in zip(before, weights(model), strict=True)]
    conv, scale, shift, weight, bias = moved[:5]
    for parts in ([conv], [scale, shift], [weight, bias]):
        step = torch.cat([part.flatten() for part in parts])
        torch.testing.assert_close(step.square().mean().sqrt(), torch.tensor(0.01), rtol=1e-4, atol=0.0)


def test_kl_clip_bounds_the_quadratic_model() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=1.0, momentum=0.0, update_size="kl_clip", kl_clip=1e-4, damping=1e-2)
    before = weights(model)
    x, y = batches(1)[0]
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    product = sum(
        ((b - a) * p.grad).sum()
        for a, b, p in zip(before, weights(model), model.parameters(), strict=True)
        if p.grad is not None
    )
    # the step is -nu P with nu = sqrt(kl / <P, g>), so <step, g>^2 = kl <P, g> and <step, g> * nu = -kl
    solved = sum(
        (block.precondition({k: p.grad for k, p in block.rule.params.items() if p.grad is not None})[k] * p.grad).sum()
        for block in optimizer.blocks.values()
        for k, p in block.rule.params.items()
        if p.grad is not None
    )
    torch.testing.assert_close(torch.as_tensor(product).square(), 1e-4 * torch.as_tensor(solved), rtol=1e-3, atol=0.0)


def test_momentum_of_the_paper_is_heavy_ball() -> None:
    model = small_net().double()
    optimizer = tc.KFAC(
        model, lr=0.1, momentum=0.7, update_size="none", damping=0.1, factor_interval=1, inverse_interval=1
    )
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}
    for x, y in batches(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(x.double()), y).backward()
        before = weights(model)
        optimizer.step()
        expected = {}
        for block in optimizer.blocks.values():
            grads = {k: p.grad for k, p in block.rule.params.items() if p.grad is not None}
            for k, solved in block.precondition(grads).items():
                p = block.rule.params[k]
                buffers[p] = 0.7 * buffers[p] + solved
                expected[p] = buffers[p]
        for old, p in zip(before, model.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), old - 0.1 * expected[p], rtol=1e-10, atol=1e-12)


def test_rms_momentum_is_a_bias_corrected_nesterov_average() -> None:
    model = small_net().double()
    optimizer = tc.KFAC(model, lr=0.1, momentum=0.7, factor_interval=1, inverse_interval=1)
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}
    for k, (x, y) in enumerate(batches(4), start=1):
        optimizer.zero_grad()
        functional.cross_entropy(model(x.double()), y).backward()
        before = {p: p.detach().clone() for p in model.parameters()}
        optimizer.step()
        for block in optimizer.blocks.values():
            solved = block.precondition({n: p.grad for n, p in block.rule.params.items() if p.grad is not None})
            rms = torch.cat([s.flatten() for s in solved.values()]).square().mean().sqrt()
            for n, p in block.rule.params.items():
                buffers[p] = 0.7 * buffers[p] + 0.3 * solved[n] / rms
                step = (0.7 * buffers[p] + 0.3 * solved[n] / rms) / (1 - 0.7 ** (k + 1))
                torch.testing.assert_close(p.detach(), before[p] - 0.1 * step, rtol=1e-9, atol=1e-12)


def test_weight_decay_is_decoupled() -> None:
    models = [small_net(), small_net()]
    for model, decay in zip(models, (0.0, 0.5), strict=True):
        train(model, tc.KFAC(model, lr=0.01, weight_decay=decay), batches(1))
    start = weights(small_net())
    for plain, decayed, old in zip(weights(models[0]), weights(models[1]), start, strict=True):
        torch.testing.assert_close(decayed, plain - 0.01 * 0.5 * old)


def test_maximize_is_the_mirror_image() -> None:
    up, down = small_net(), small_net()
    x, y = batches(1)[0]
    for model, sign in ((up, -1.0), (down, 1.0)):
        optimizer = tc.KFAC(model, lr=0.01, maximize=sign < 0)
        (sign * functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
    for a, b in zip(weights(up), weights(down), strict=True):
        torch.testing.assert_close(a, b)


# ---- state


@pytest.mark.parametrize("at", [1, 4, 7])
def test_resume_is_bit_for_bit(at: int) -> None:
    settings: dict[str, Any] = {"lr": 0.01, "factor_interval": 3, "inverse_interval": 5}
    model = small_net()
    optimizer = tc.KFAC(model, **settings)
    data = batches(12)
    train(model, optimizer, data[:at])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data[at:])

    resumed = small_net()
    other = tc.KFAC(resumed, **settings)
    train(resumed, other, batches(2))  # leaves state that loading must overwrite
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, data[at:])
    for a, b in zip(weights(model), weights(resumed), strict=True):
        assert torch.equal(a, b)


def test_state_exists_from_the_start_and_keeps_its_buffers() -> None:
    model = small_net()
    optimizer = tc.KFAC(model)
    assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())
    addresses = [t.data_ptr() for s in optimizer.state.values() for t in s.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert addresses == [t.data_ptr() for s in optimizer.state.values() for t in s.values()]


def test_bf16_model_keeps_fp32_factors_through_a_checkpoint() -> None:
    model = small_net().to(torch.bfloat16)
    optimizer = tc.KFAC(model, lr=1e-2)
    losses = train(model, optimizer, [(x.to(torch.bfloat16), y) for x, y in batches(1) * 20])
    assert losses[-1] < 0.5 * losses[0]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {t.dtype for s in optimizer.state.values() for n, t in s.items() if n in "AGF"} == {torch.float32}


def test_state_of_another_model_is_refused_unchanged() -> None:
    model = small_net()
    optimizer = tc.KFAC(model)
    other = tc.KFAC(nn.Linear(3, 2))
    with pytest.raises(tc.StateMismatchError, match="sizes"):
        optimizer.load_state_dict(other.state_dict())
    wide = small_net()
    wide[6] = nn.Linear(8, 5)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(tc.StateMismatchError, match="shape"):
        optimizer.load_state_dict(tc.KFAC(wide).state_dict())
    with pytest.raises(tc.StateMismatchError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), momentum=0.9).state_dict())
    assert str(before) == str(optimizer.state_dict())


# ---- hyper-parameters


def test_schedulers_built_in_either_order_change_the_step() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.01, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    sizes = []
    for batch in batches(3):
        before = weights(model)[0]
        train(model, optimizer, [batch])
        sizes.append((weights(model)[0] - before).square().mean().sqrt().item())
        scheduler.step()
    assert sizes == pytest.approx([0.01, 0.005, 0.0025], rel=1e-4)


def test_tensor_hyper_parameters_equal_floats() -> None:
    models = [small_net(), small_net()]
    train(models[0], tc.KFAC(models[0], lr=0.01, momentum=0.8, relative_damping=0.1), batches(5))
    floats = {"lr": 0.01, "momentum": 0.8, "relative_damping": 0.1}
    tensors: dict[str, Any] = {k: torch.tensor(v) for k, v in floats.items()}
    train(models[1], tc.KFAC(models[1], **tensors), batches(5))
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_groups_by_module_pattern() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.01, momentum=0.0, groups=[{"modules": ["4", "6"], "lr": 0.0, "damping": 1.0}])
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.01]
    before = weights(model)
    train(model, optimizer, batches(1))
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    assert moved == [True, True, True, False, False, False, False]
    with pytest.raises(tc.ConfigurationError, match="no match"):
        tc.KFAC(model, groups=[{"modules": "layer9.*", "lr": 0.1}])
    with pytest.raises(tc.ConfigurationError, match="learning_rate"):
        tc.KFAC(model, groups=[{"modules": "4", "learning_rate": 0.1}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr >= 0, got -1"),
        ({"momentum": 1.0}, "momentum"),
        ({"damping": float("nan")}, "damping"),
        ({"fisher": "sampled"}, "fisher"),
        ({"fallback": "lion"}, "fallback"),
        ({"update_size": "big"}, "update_size"),
        ({"norm_fisher": "half"}, "norm_fisher"),
        ({"factor_interval": 0}, "intervals"),
        ({"factor_decay": 1.0}, "factor_decay"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.ConfigurationError, match=message):
        tc.KFAC(small_net(), **settings)


def test_a_model_without_any_block_is_refused() -> None:
    with pytest.raises(tc.ConfigurationError, match="at least one"):
        tc.KFAC(nn.Sequential(nn.LayerNorm(3)))


# ---- every parameter is trained


class Mixed(nn.Module):
    """Embedding and layer norm have no block yet; one Linear is tied, one frozen, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.hidden = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.weight.requires_grad_(False)
        self.unused = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.frozen(self.hidden(self.norm(self.embed(tokens)))).relu())
        return out


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_explain_names_every_parameter_and_fallback_trains_it(fallback: Any) -> None:
    torch.manual_seed(0)
    model = Mixed()
    optimizer = tc.KFAC(model, lr=1e-2, fallback=fallback)
    rows = {row.parameter: row for row in optimizer.explain().rows}
    assert set(rows) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert rows["hidden.weight"].trainer == "kfac"
    assert "shared" in rows["embed.weight"].note
    assert rows["embed.weight"].trainer == fallback
    assert "LayerNorm" in rows["norm.weight"].note
    assert "frozen" in rows["frozen.bias"].note
    assert "norm.weight" in str(optimizer.explain())

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 7, (4, 3))
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"frozen.weight", "unused.weight", "unused.bias"}


@pytest.mark.parametrize("update_size", ["rms", "kl_clip", "none"])
def test_a_step_without_any_gradient_changes_nothing(update_size: UpdateSize) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = tc.KFAC(model, update_size=update_size, groups=[{"modules": "1", "lr": 0.1}])
    before = weights(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    train(model, optimizer, [(torch.randn(5, 4), torch.randint(0, 3, (5,)))])
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert optimizer.blocks["0"].factors()["A"].shape == (5, 5)


def test_fallback_is_torch_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    optimizer = tc.KFAC(model, lr=0.0, fallback_lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW(twin[0].parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        x = torch.randn(5, 4)
        for net, opt in ((model, optimizer), (twin, reference)):
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
    torch.testing.assert_close(weights(model)[0], weights(twin)[0])
    assert not torch.equal(weights(model)[0], torch.ones(4))


def test_add_param_group_trains_by_fallback_and_says_so() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.01)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    x, y = batches(1)[0]
    functional.cross_entropy(model(x) * extra, y).backward()
    optimizer.step()
    assert not torch.equal(extra, torch.ones(3))
    assert "add_param_group" in optimizer.explain().rows[-1].note
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


# ---- capture


def test_inplace_activations_give_the_same_step() -> None:
    models = [small_net(inplace=False), small_net(inplace=True)]
    for model in models:
        train(model, tc.KFAC(model, lr=0.01, factor_interval=1), batches(3))
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_capture_compiles_without_graph_breaks(backend: str, inplace: bool) -> None:
    x, y = batches(1)[0]
    factors = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = small_net(inplace)
        optimizer = tc.KFAC(model)
        forward = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        functional.cross_entropy(forward(x), y).backward()
        factors.append({n: b.factors() for n, b in optimizer.blocks.items()})
    for name, expected in factors[0].items():
        for kind, value in expected.items():
            torch.testing.assert_close(factors[1][name][kind], value, rtol=1e-5, atol=1e-6)


def test_a_compiled_model_has_one_graph_for_each_state_of_the_taps() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_net()
    optimizer = tc.KFAC(model, lr=1e-3, factor_interval=4, inverse_interval=4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x, y in batches(10):
        functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_taps_run_only_on_steps_that_need_them() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, factor_interval=3)
    seen = []
    for batch in batches(7):
        x, y = batch
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        seen.append(bool(optimizer._store.counts.any()))
        optimizer.step()
    assert seen == [True, False, False, True, False, False, True]


def test_a_bypassed_layer_is_an_error() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.fc.weight, self.fc.bias)

    model = Bypass()
    optimizer = tc.KFAC(model)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(tc.NoStatisticsError, match=r"\['fc'\]"):
        optimizer.step()


class Twice(nn.Module):
    """Calls its layer twice; only the second output reaches the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.fc(x.roll(1, 0))
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_whose_output_is_not_used_adds_nothing(compiled: bool) -> None:
    torch.manual_seed(0)
    once, twice = nn.Sequential(nn.Linear(4, 3)), Twice()
    twice.fc.load_state_dict(once[0].state_dict())
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    factors = []
    for model in (once, twice):
        optimizer = tc.KFAC(model)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        functional.cross_entropy(run(x), y).backward()
        factors.append(next(iter(optimizer.blocks.values())).factors())
    for name, value in factors[0].items():
        torch.testing.assert_close(factors[1][name], value)


def test_a_copy_of_the_model_is_not_tapped() -> None:
    model = small_net()
    optimizer = tc.KFAC(model)
    x, y = batches(1)[0]
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for twin in (copy.deepcopy(model), loaded):
        functional.cross_entropy(twin(x), y).backward()
        assert not optimizer._store.counts.any()


def test_detach_leaves_the_model_as_it_was() -> None:
    model = small_net()
    optimizer = tc.KFAC(model)
    optimizer.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_factors_before_any_backward_is_an_error() -> None:
    optimizer = tc.KFAC(small_net())
    with pytest.raises(tc.NoStatisticsError, match="backward"):
        optimizer.blocks["4"].factors()
    with pytest.raises(tc.NoStatisticsError, match="backward"):
        optimizer.refresh()


def test_precondition_checks_names_and_shapes() -> None:
    model = small_net()
    optimizer = tc.KFAC(model)
    train(model, optimizer, batches(1))
    block = optimizer.blocks["4"]
    with pytest.raises(tc.ConfigurationError, match="bias"):
        block.precondition({"weight": torch.zeros(8, 64)})
    with pytest.raises(tc.ConfigurationError, match="shape"):
        block.precondition({"weight": torch.zeros(64, 8), "bias": torch.zeros(8)})


def test_grad_scaler_is_taken_out_of_the_factors() -> None:
    results = []
    for scale in (None, 1024.0):
        model = small_net()
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = tc.KFAC(model, lr=0.01, update_size="none", damping=0.1, grad_scaler=scaler)
        x, y = batches(1)[0]
        loss = functional.cross_entropy(model(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- failures


def poison_gradient(model: nn.Sequential, optimizer: tc.KFAC) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.view(-1)[0] = float("nan")


def test_a_step_with_nan_gradients_changes_nothing_and_is_counted() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.01)
    train(model, optimizer, batches(2))
    before, momentum = weights(model), [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    x, y = batches(3)[2]
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    poison_gradient(model, optimizer)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    kept = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, kept, strict=True))
    assert optimizer.health()["optimizer"]["skipped_steps"] == 1


def test_nan_statistics_never_enter_the_average() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.01, factor_interval=1, inverse_interval=1)
    train(model, optimizer, batches(2))
    before = {n: b.factors() for n, b in optimizer.blocks.items()}
    x, y = batches(1)[0]
    optimizer.zero_grad()
    functional.cross_entropy(model(x * float("inf")), y).backward()
    optimizer.step()
    for name, kinds in before.items():
        for kind, value in kinds.items():
            assert optimizer.blocks[name].factors()[kind].isfinite().all()
            if kind == "A" and name == "0":
                torch.testing.assert_close(optimizer.blocks[name].factors()[kind], value)


def break_factor(optimizer: tc.KFAC, how: str) -> None:
    average = optimizer.state[optimizer.blocks["4"].rule.params["weight"]]["A"]
    if how == "indefinite":
        average.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
    else:
        average.fill_(float(how))


@pytest.mark.parametrize("how", ["indefinite", "nan", "inf"])
def test_failure_ladder_is_climbed_and_left(how: str) -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=1e-3, factor_interval=100, inverse_interval=1)
    train(model, optimizer, batches(1))
    healthy = optimizer.state[optimizer.blocks["4"].rule.params["weight"]]["A"].clone()
    previous = optimizer.blocks["4"].inverses["A"].clone()
    break_factor(optimizer, how)
    rungs = []
    for batch in batches(6)[1:]:
        train(model, optimizer, [batch])
        rungs.append(optimizer.health()["4"]["rung"])
        if rungs[-1] == "previous":
            assert torch.equal(optimizer.blocks["4"].inverses["A"], previous)
    assert rungs == ["previous"] * 3 + ["identity"] * 2
    assert optimizer.health()["4"]["failures"] == 5
    assert optimizer.health()["0"]["rung"] == "fresh"
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer.state[optimizer.blocks["4"].rule.params["weight"]]["A"].copy_(healthy)
    train(model, optimizer, batches(7)[6:])
    assert optimizer.health()["4"]["rung"] == "fresh"
    assert optimizer.health()["4"]["failures"] == 0


def test_ladder_uses_the_diagonal_where_only_the_rest_is_broken() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=1e-3, factor_interval=100, inverse_interval=1, damping=1e-14)
    train(model, optimizer, batches(1))
    average = optimizer.state[optimizer.blocks["6"].rule.params["weight"]]["G"]
    average.copy_(
        torch.tensor([[1.0, 5.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 2.0]])[None]
    )  # indefinite, positive diagonal
    train(model, optimizer, batches(6)[1:])
    assert optimizer.health()["6"]["rung"] == "diagonal"
    expected = torch.diag(torch.tensor([1.0, 1.0, 0.5]))[None]
    torch.testing.assert_close(optimizer.blocks["6"].inverses["G"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("call", [lambda o: o.explain(), lambda o: o.health(), lambda o: repr(o)])
def test_reports_do_not_disturb_the_state(call: Callable[[tc.KFAC], object]) -> None:
    models = [small_net(), small_net()]
    optimizers = [tc.KFAC(m, lr=0.01) for m in models]
    for batch in batches(3):
        train(models[0], optimizers[0], [batch])
        train(models[1], optimizers[1], [batch])
        call(optimizers[1])
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        assert torch.equal(a, b)
