"""KFAC as a torch optimizer: state, schedules, groups, coverage, failures. Its mathematics: test_kfac_exact."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import triton_curv as tc
from tests.support.small_net import batches, small_net, train, weights
from triton_curv.optimizers.kfac_options import UpdateSize


@pytest.mark.parametrize("update_size", ["matched", "rms", "kl_clip", "none"])
def test_training_lowers_the_loss(update_size: UpdateSize) -> None:
    model = small_net()
    lr, damping = {"matched": (3e-2, None), "rms": (1e-2, None), "kl_clip": (0.05, None), "none": (0.02, 0.1)}[
        update_size
    ]
    optimizer = tc.KFAC(model, lr=lr, damping=damping, update_size=update_size)
    losses = train(model, optimizer, batches(1) * 40)
    assert losses[-1] < 0.1 * losses[0]


def test_rms_step_has_the_size_of_lr() -> None:
    model = small_net()
    before = weights(model)
    train(model, tc.KFAC(model, lr=0.01, momentum=0.0, update_size="rms"), batches(1))
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
    optimizer = tc.KFAC(model, lr=0.1, momentum=0.7, factor_interval=1, inverse_interval=1, update_size="rms")
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
    optimizer = tc.KFAC(model, lr=0.01, momentum=0.0, update_size="rms")
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
        ({"fisher": "joint"}, "fisher"),
        ({"inverse": "lu"}, "inverse"),
        ({"rescale": "always"}, "rescale"),
        ({"ekfac": True}, "eigen"),
        ({"refresh_budget": 0}, "refresh_budget"),
        ({"refresh_budget": "odd"}, "refresh_budget"),
        ({"refresh_budget": "even", "inverse": "eigen", "ekfac": True}, "'even'"),
        ({"factor_interval": tc.AdaptiveInterval(), "refresh_budget": 1}, "AdaptiveInterval"),
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
        tc.KFAC(nn.Sequential(nn.PReLU(3)))


# ---- every parameter is trained


class Mixed(nn.Module):
    """One Linear is tied to the embedding, one frozen, one unused; the PReLU has no block."""

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
        self.act = nn.PReLU()

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.act(self.frozen(self.hidden(self.norm(self.embed(tokens))))))
        return out


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_explain_names_every_parameter_and_fallback_trains_it(fallback: Any) -> None:
    torch.manual_seed(0)
    model = Mixed()
    optimizer = tc.KFAC(model, lr=1e-2, fallback=fallback)
    rows = {row.parameter: row for row in optimizer.explain().rows}
    assert set(rows) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert rows["hidden.weight"].trainer == "kfac"
    assert "embedding and head" in rows["embed.weight"].note
    assert rows["embed.weight"].trainer == "kfac"
    assert "PReLU" in rows["act.weight"].note
    assert rows["act.weight"].trainer == fallback
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
    model = nn.Sequential(nn.Linear(4, 3), nn.PReLU(3))
    optimizer = tc.KFAC(model, update_size=update_size, groups=[{"modules": "1", "lr": 0.1}])
    before = weights(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    train(model, optimizer, [(torch.randn(5, 4), torch.randint(0, 3, (5,)))])
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert optimizer.blocks["0"].factors()["A"].shape == (5, 5)


def test_fallback_is_torch_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.PReLU(4, init=1.0), nn.Linear(4, 1))
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


def test_a_group_that_is_refused_leaves_nothing_behind() -> None:
    optimizer = tc.KFAC(small_net())
    count = len(optimizer.param_groups)
    for params, settings in ((torch.ones(3), {"lr": -1.0}), (torch.ones(3, dtype=torch.complex64), {})):
        with pytest.raises(tc.ConfigurationError):
            optimizer.add_param_group({"params": [nn.Parameter(params)], **settings})
        assert len(optimizer.param_groups) == count


def test_layers_unfrozen_later_are_warned_about_until_they_are_added() -> None:
    model = small_net()
    model[0].requires_grad_(False)
    optimizer = tc.KFAC(model, factor_interval=1)
    frozen = weights(model)[0].detach().clone()
    train(model, optimizer, batches(2))
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"does not train \['0.weight'\]"):
        train(model, optimizer, batches(1))
    assert torch.equal(frozen, weights(model)[0])
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer, batches(1))
    assert not torch.equal(frozen, weights(model)[0])
    assert "0.weight" in {row.parameter for row in optimizer.explain().rows}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(2)), "lazy"),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, dtype=torch.complex64)), "complex64: '1.weight'"),
    ],
)
def test_parameters_that_it_cannot_train_are_named(model: nn.Module, message: str) -> None:
    with pytest.raises(tc.ConfigurationError, match=message):
        tc.KFAC(model)
