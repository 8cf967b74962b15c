"""Copies of a pair (model, optimizer), by deepcopy or pickle, train on like the original, which does not notice."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ExponentialLR

import triton_curv as tc

X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


BUILDS: dict[str, Any] = {
    "kfac": lambda m: tc.KFAC(m, lr=torch.tensor(0.01), factor_interval=2, inverse_interval=2),
    "kfac-adaptive": lambda m: tc.KFAC(m, lr=0.01, factor_interval=tc.AdaptiveInterval(0.5), inverse="eigen"),
    "kfac-even": lambda m: tc.KFAC(m, refresh_budget="even", factor_interval=2, inverse_interval=2),
    "kfac-ekfac": lambda m: tc.KFAC(m, inverse="eigen", ekfac=True, damping_rule=tc.WarmupDamping(10.0, 5)),
    "newton-cg": lambda m: tc.NewtonCG(m, product="reverse", warm_start=0.5),
    "newton-cg-kfac": lambda m: tc.NewtonCG(m, product="reverse", preconditioner=tc.KFAC(m)),
    "sgn": lambda m: tc.SGN(m, product="double_vjp", momentum=0.5),
    "inner": lambda m: tc.NeumannInner(m, inner_steps=2),
}


class Net(nn.Module):
    """Attention's forward is replaced while it is tapped; a batch norm and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.late, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.late.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))[:, None]
        x = self.attention(x, x, x, need_weights=False)[0][:, 0]
        out: Tensor = self.head(self.late(x))
        return out


def advance(model: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        if isinstance(optimizer, tc.KFAC):
            optimizer.zero_grad()
            cross_entropy(model(X), Y).backward()
            optimizer.step()
        else:

            def closure() -> Any:
                z = model(X)
                loss = cross_entropy(z, Y)
                return (loss, z) if isinstance(optimizer, tc.SGN) else loss

            optimizer.step(closure)
        scheduler.step()


@pytest.mark.parametrize("name", BUILDS)
def test_copies_train_on_like_the_original(name: str) -> None:
    """A group was added, and a layer frozen, since the optimizer was built."""
    model = Net()
    optimizer = BUILDS[name](model)
    scheduler = ExponentialLR(optimizer, 0.9)
    model.late.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.late.parameters()), "lr": 0.05})
    advance(model, optimizer, scheduler, 3)
    copies = [copier((model, optimizer, scheduler)) for copier in (copy.deepcopy, pickled)]
    copies.append(copy.deepcopy(copies[0]))
    for pair in copies:
        assert str(pair[1].state_dict()) == str(optimizer.state_dict())
        advance(pair[0], pair[1], pair[2], 3)
    advance(model, optimizer, scheduler, 3)
    for other, its_optimizer, _ in copies:
        assert its_optimizer.param_groups[-1]["params"][0] is other.late.weight
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    if isinstance(optimizer, tc.KFAC):
        assert str(copies[0][1].explain()).count("added") == str(optimizer.explain()).count("added") > 0


def test_an_optimizer_that_is_part_of_its_model() -> None:
    """As in a LightningModule of one's own; the copy is built when it is used, by then the model is complete."""
    model: Any = Net()
    model.optimizer = tc.KFAC(model, lr=0.01)
    for copier in (copy.deepcopy, pickled):
        twin = copier(model)
        before = twin.first.weight.detach().clone()
        cross_entropy(twin(X), Y).backward()
        with pytest.raises(tc.NoStatisticsError):  # the taps are not there yet
            twin.optimizer.step()
        twin.optimizer.zero_grad()
        cross_entropy(twin(X), Y).backward()
        twin.optimizer.step()
        assert not torch.equal(twin.first.weight, before)
        assert twin.optimizer.param_groups[0]["params"][0] is not model.optimizer.param_groups[0]["params"][0]
        with pytest.raises(AttributeError, match="nothing"):
            _ = twin.optimizer.nothing


@pytest.mark.parametrize("alive", [True, False])
def test_a_deleted_optimizer_leaves_its_model(alive: bool) -> None:
    model = Net()
    plain = [len(module._forward_hooks) for module in model.modules()]
    other = tc.KFAC(model) if alive else None
    before = [len(module._forward_hooks) for module in model.modules()]
    optimizer = tc.KFAC(model)
    advance(model, optimizer, ExponentialLR(optimizer, 0.9), 2)
    store = weakref.ref(optimizer._store)
    del optimizer
    gc.collect()
    assert store() is None
    assert [len(module._forward_hooks) for module in model.modules()] == before
    assert ("forward" in model.attention.__dict__) == alive
    if other is not None:
        advance(model, other, ExponentialLR(other, 0.9), 2)
    else:
        assert before == plain


@pytest.mark.parametrize("name", ["kfac", "newton-cg", "neumann"])
def test_a_state_of_the_same_layers_in_another_order_is_refused_unchanged(name: str) -> None:
    def build(*order: str) -> tuple[nn.ModuleDict, Any]:
        model = nn.ModuleDict({key: nn.Linear(3, 3) for key in order})
        return model, tc.Neumann(model.named_parameters()) if name == "neumann" else BUILDS[name](model)

    _, optimizer = build("a", "b")
    state = copy.deepcopy(optimizer.state_dict())
    (_, twin), (_, other) = build("a", "b"), build("b", "a")
    twin.load_state_dict(state)
    before = str(other.state_dict())
    with pytest.raises(tc.StateMismatchError, match=r"the state of .b\.weight., got that of .a\.weight."):
        other.load_state_dict(state)
    assert str(other.state_dict()) == before
    _, wrapped = build("a_x", "b_x")  # other names, as behind a wrapper: told by shapes alone
    wrapped.load_state_dict(state)
