"""Taps: what reaches the factors, under torch.compile, in-place layers, copies and GradScaler."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import triton_curv as tc
from tests.support.dense import relative_error
from tests.support.small_net import batches, small_net, train, weights


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
            assert relative_error(factors[1][name][kind], value) < 1e-6, (name, kind)


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


@pytest.mark.parametrize("how", ["penalty", "attack", "inputs"])
def test_gradients_of_inputs_give_no_statistics(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = tc.KFAC(model)
    x = torch.randn(6, 4, requires_grad=True)
    if how == "inputs":
        model(x).square().mean().backward(inputs=[x])
    else:
        (gradient,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=how == "penalty")
    assert not any(block.counts.any() for block in optimizer.blocks.values())
    loss = model(x if how == "penalty" else x.detach()).square().mean()
    (loss + gradient.square().sum() if how == "penalty" else loss).backward()
    assert {float(block.counts[1]) for block in optimizer.blocks.values()} == {12.0 if how == "penalty" else 6.0}


def test_gradients_by_autograd_grad_give_statistics_of_the_layers_they_are_of() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = tc.KFAC(model)
    torch.autograd.grad(model(torch.randn(6, 4)).square().mean(), list(model[0].parameters()))
    assert optimizer.blocks["0"].counts[1] == 6
    assert optimizer.blocks["2"].counts[1] == 0


def test_transforms_of_torch_func_run_beside_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = tc.KFAC(model)
    x = torch.randn(6, 4)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], row: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, given, (row[None],)).square().mean()
        return result

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    torch.func.jacrev(model)(x)
    torch.func.jvp(model, (x,), (x,))
    assert not any(block.counts.any() for block in optimizer.blocks.values())
    model(x).square().mean().backward()
    optimizer.step()
    assert optimizer.blocks["0"].folds() == 1


def test_replicas_on_other_devices_are_refused() -> None:
    model = nn.DataParallel(small_net())
    tc.KFAC(model)  # one device: the model itself runs
    model.device_ids = [0, 1]
    with pytest.raises(tc.ConfigurationError, match="DistributedDataParallel"):
        tc.KFAC(model)
