"""KFAC when gradients or factors go bad: skipped steps, the failure ladder, reports."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import triton_curv as tc
from tests.support.small_net import batches, small_net, train, weights
from triton_curv import hostcheck
from triton_curv.inverse import InverseName, eigenbasis
from triton_curv.packing import diagonal_places, pack

pytestmark = pytest.mark.filterwarnings("ignore::triton_curv.NumericalWarning")


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
        average[diagonal_places(65, average.device)] = -1.0
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
    indefinite = torch.tensor([[1.0, 5.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 2.0]])  # its diagonal is positive
    average.copy_(pack(indefinite[None])[0])
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


INVERSES: list[InverseName] = ["cholesky", "eigen", "neumann"]
READERS = (
    "triton_curv.inverse.known_true",
    "triton_curv.blocks.bank.known_true",
    "triton_curv.blocks.centre.known_true",
    "triton_curv.blocks.samples.known_true",
    "triton_curv.blocks.inversion.known_true",
    "triton_curv.blocks.shifts.known_true",
    "triton_curv.optimizers.apply.known_true",
    "triton_curv.optimizers.fallback.known_true",
    "triton_curv.optimizers.kfac.known_true",
    "triton_curv.optimizers.hyper.on_host",
    "triton_curv.optimizers.host_moves.on_host",
    "triton_curv_kernels.momentum.runs_on_host",
)
INJECTIONS = ["gradient", "statistics", "nan", "inf", "indefinite", "throws", "residual"]


def throwing(*_: object, **__: object) -> Any:
    raise RuntimeError("injected")


def inject(how: str, model: nn.Sequential, optimizer: tc.KFAC, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break one thing of the coming step."""
    if how in ("nan", "inf", "indefinite"):
        break_factor(optimizer, how)
    elif how == "throws":
        for name in ("cholesky_ex", "eigh"):
            monkeypatch.setattr(torch.linalg, name, throwing)
        monkeypatch.setattr(
            "triton_curv.inverse.damped_inverse_", lambda x, f, s, **_: torch.full_like(torch.cat(s), torch.nan)
        )
    elif how == "residual":
        wrong = torch.cholesky_inverse
        monkeypatch.setattr(torch, "cholesky_inverse", lambda f: 2 * wrong(f))
        vectors = torch.linalg.eigh
        monkeypatch.setattr(torch.linalg, "eigh", lambda m: (vectors(m)[0] * 3 + 1, vectors(m)[1]))
        monkeypatch.setattr(
            "triton_curv.inverse.damped_inverse_", lambda x, f, s, **_: torch.full_like(torch.cat(s), 0.5)
        )


@pytest.mark.parametrize("device_blind", [False, True], ids=["host-knows", "host-blind"])
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("how", INJECTIONS)
def test_every_injected_failure_is_survived_and_counted(
    how: str, inverse: InverseName, device_blind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad step out of four: all weights stay finite, the last steps move them, the event is counted."""
    if device_blind:
        for reader in READERS:
            monkeypatch.setattr(reader, lambda *_: False)
    model = small_net()
    optimizer = tc.KFAC(model, lr=1e-3, factor_interval=1, inverse_interval=1, inverse=inverse)
    data = batches(5)
    train(model, optimizer, data[:2])
    with monkeypatch.context() as patch:
        x, y = data[2]
        optimizer.zero_grad()
        optimizer.capture(how != "nan")
        functional.cross_entropy(model(x * float("inf") if how == "statistics" else x), y).backward()
        if how == "gradient":
            poison_gradient(model, optimizer)
        inject(how, model, optimizer, patch)
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
    before = weights(model)
    for buffer in model.buffers():  # an infinite batch breaks running statistics, which are not ours
        buffer.copy_(torch.ones_like(buffer)) if not buffer.isfinite().all() else None
    train(model, optimizer, data[3:])
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    counts = optimizer.health()["optimizer"]
    kind = {"gradient": "skipped_steps", "statistics": "discarded_statistics"}.get(how, "failed_inverses")
    assert counts[kind] > 0
    restored = tc.KFAC(small_net(), lr=1e-3, factor_interval=1, inverse_interval=1, inverse=inverse)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.health()["optimizer"] == counts


def test_what_the_host_knows_changes_nothing() -> None:
    """Short cuts of folding and inverting: bitwise the same with and without, through good steps and bad ones."""
    runs = []
    for blind in (False, True):
        model = small_net()
        optimizer = tc.KFAC(model, lr=1e-3, factor_interval=1, inverse_interval=1)
        store, seen = optimizer._store, []
        with pytest.MonkeyPatch.context() as patch:
            for reader in READERS[:5] if blind else ():
                patch.setattr(reader, lambda *_: False)
            for number, (x, y) in enumerate(batches(6)):
                if number == 3:
                    healthy = [bank.averages.clone() for bank in store.banks]
                    break_factor(optimizer, "indefinite")
                elif number == 5:
                    for bank, averages in zip(store.banks, healthy, strict=True):
                        bank.averages.copy_(averages)
                optimizer.zero_grad()
                functional.cross_entropy(model(x * float("inf") if number == 2 else x), y).backward()
                optimizer.step()
                vectors = (
                    store.folds,
                    store.folded_traces,
                    store.samples,
                    store.failures,
                    store.rungs,
                    store.residuals,
                )
                seen += [v.clone() for v in (*vectors, store.failed, store.discarded, store.shifts)] + weights(model)
        runs.append(seen)
    rungs = runs[0][4 :: len(runs[0]) // 6]
    assert [bool((each > 0).any()) for each in rungs] == [False, False, False, True, True, False]
    for known, blind_to in zip(*runs, strict=True):
        torch.testing.assert_close(known, blind_to, rtol=0, atol=0, equal_nan=True)


class NoHostRead(TorchDispatchMode):
    """Raises where a value is read on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError(f"{func} reads a value on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("update_size", ["rms", "kl_clip", "none"])
def test_healthy_steps_read_nothing_on_the_host(
    update_size: Any, fallback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hostcheck as on a GPU: folding, inverting and applying steps; the first step, which checks taps, aside."""
    assert not hostcheck.known_true(torch.zeros(1, device="meta"))
    for reader in READERS:
        monkeypatch.setattr(reader, lambda *_: False)
    monkeypatch.setattr("triton_curv.health.HealthMonitor.watch", lambda self: None)
    model = nn.Sequential(small_net(), nn.LayerNorm(3))
    optimizer = tc.KFAC(
        model, lr=1e-3, factor_interval=2, inverse_interval=2, update_size=update_size, fallback=fallback, damping=0.1
    )
    data = batches(5)
    train(model, optimizer, data[:1])
    for x, y in data[1:]:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        with NoHostRead():
            optimizer.step()
    with pytest.raises(AssertionError, match="host"), NoHostRead():
        float(torch.ones(1) + 1)


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_the_fallback_with_a_flag_is_the_fallback(fallback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for blind in (False, True):
        if blind:
            for reader in READERS:
                monkeypatch.setattr(reader, lambda *_: False)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        optimizer = tc.KFAC(model, lr=1e-2, weight_decay=0.1, fallback=fallback)
        data = torch.randn(6, 5, 4)
        for i, x in enumerate(data):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if i == 3:
                poison_gradient(model, optimizer)
            optimizer.step()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_each_kind_is_warned_about_once() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.01)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for x, y in batches(4):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            if optimizer.param_groups[0]["step"]:
                poison_gradient(model, optimizer)
            optimizer.step()
    assert [w.category for w in seen if w.category is tc.NumericalWarning] == [tc.NumericalWarning]
    assert optimizer.health()["optimizer"]["skipped_steps"] == 3


def test_out_of_memory_is_not_a_failed_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> Any:
        raise torch.OutOfMemoryError("injected")

    model = small_net()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, tc.KFAC(model), batches(1))


@pytest.mark.parametrize("passes", [1, 2])
def test_eigh_is_tried_again_with_jitter_and_in_float64(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 LAPACK fails on some real factors; here it does on command, and the results are right all the same."""
    real, calls = torch.linalg.eigh, []

    def unreliable(matrix: Tensor) -> Any:
        calls.append(matrix.dtype)
        if len(calls) <= passes:
            raise RuntimeError("linalg.eigh: failed to converge (injected)")
        return real(matrix)

    rows = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    matrix = (rows.T @ rows)[None]
    monkeypatch.setattr(torch.linalg, "eigh", unreliable)
    result = eigenbasis(matrix)
    assert calls == [torch.float32, torch.float32, torch.float64][: passes + 1]
    assert bool(result.ok.all())
    back = result.bases @ torch.diag_embed(result.spectra) @ result.bases.mT
    torch.testing.assert_close(back, matrix, rtol=1e-4, atol=1e-3)


def test_one_bad_matrix_does_not_spoil_its_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def picky(matrix: Tensor) -> Any:
        if not bool(matrix.isfinite().all()):
            raise RuntimeError("not finite")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", picky)
    good = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    result = eigenbasis(torch.stack([good, good * float("nan"), good]))
    assert result.ok.tolist() == [True, False, True]


def test_health_survives_pickle() -> None:
    optimizer = tc.KFAC(small_net())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True)["state"][0]["events"].tolist() == [0, 0, 0, 0]
