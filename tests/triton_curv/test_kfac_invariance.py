"""Factors, preconditioner and step do not depend on how the same data and loss are presented."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.support.capture import kfac
from tests.support.dense import relative_error
from triton_curv import KFAC

Batch = tuple[Tensor, Tensor]

SAMPLES = 6
SCALE = 64.0


def micro_batches(x: Tensor, y: Tensor, sizes: list[int]) -> list[Batch]:
    return list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))


@dataclass(frozen=True)
class Presentation:
    """One step's batches, the multiple of their mean loss, what KFAC is told, whether BN sees no change."""

    batches: Callable[[Tensor, Tensor], list[Batch]] = lambda x, y: [(x, y)]
    loss_factor: float = 1.0
    told: dict[str, Any] = field(default_factory=dict)
    keeps_batch_statistics: bool = True


PLAIN = Presentation()
PRESENTATIONS = {
    "duplicated": Presentation(lambda x, y: [(torch.cat([x, x]), torch.cat([y, y]))]),
    "every-sample-thrice": Presentation(lambda x, y: [(x.repeat_interleave(3, dim=0), y.repeat_interleave(3))]),
    "sum": Presentation(loss_factor=SAMPLES, told={"reduction": "sum"}),
    "scaled": Presentation(loss_factor=SCALE, told={"loss_scale": SCALE}),
    "scaled-down-sum": Presentation(loss_factor=SAMPLES / SCALE, told={"reduction": "sum", "loss_scale": 1 / SCALE}),
    "permuted": Presentation(lambda x, y: [(x[[3, 0, 5, 1, 4, 2]], y[[3, 0, 5, 1, 4, 2]])]),
    "two-micro-batches": Presentation(lambda x, y: micro_batches(x, y, [3, 3]), keeps_batch_statistics=False),
    "uneven-micro-batches": Presentation(lambda x, y: micro_batches(x, y, [1, 3, 2]), keeps_batch_statistics=False),
    "one-sample-micro-batches": Presentation(
        lambda x, y: micro_batches(x, y, [1] * SAMPLES), keeps_batch_statistics=False
    ),
    "sum-micro-batches": Presentation(
        lambda x, y: micro_batches(x, y, [2, 4]),
        loss_factor=SAMPLES,
        told={"reduction": "sum"},
        keeps_batch_statistics=False,
    ),
}


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


CASES = [
    pytest.param(net, presentation, id=f"{net.__name__}-{name}")
    for net in (conv_net, norm_net)
    for name, presentation in PRESENTATIONS.items()
    if net is conv_net or presentation.keeps_batch_statistics
]
DAMPING = [{"damping": 1e-2}, {"relative_damping": 1e-2}, {}]
DAMPING_IDS = ["absolute", "relative", "default"]


def present(net: Callable[[], nn.Sequential], presentation: Presentation, **options: Any) -> tuple[nn.Sequential, KFAC]:
    """Return the seeded net and its optimizer after the backwards of one step."""
    torch.manual_seed(0)
    model = net().double()
    x = torch.randn(SAMPLES, 2, 4, 4, dtype=torch.float64) + 0.5
    y = torch.tensor([0, 1, 2, 2, 1, 0])
    optimizer = kfac(model, **presentation.told, **options)
    batches = presentation.batches(x, y)
    scale = presentation.loss_factor / sum(len(labels) for _, labels in batches)
    for inputs, labels in batches:
        torch.autograd.backward(scale * cross_entropy(model(inputs), labels, reduction="sum"))
    return model, optimizer


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(actual[key].detach(), value.detach()) < 1e-10, key


@pytest.mark.parametrize(("net", "presentation"), CASES)
def test_factors_do_not_change(net: Callable[[], nn.Sequential], presentation: Presentation) -> None:
    _, reference = present(net, PLAIN)
    _, optimizer = present(net, presentation)
    assert optimizer.blocks.keys() == reference.blocks.keys()
    for name, block in optimizer.blocks.items():
        assert_same(block.factors(), reference.blocks[name].factors())


@pytest.mark.parametrize("damping", DAMPING, ids=DAMPING_IDS)
@pytest.mark.parametrize(("net", "presentation"), CASES)
def test_preconditioner_does_not_change(
    net: Callable[[], nn.Sequential], presentation: Presentation, damping: dict[str, float]
) -> None:
    model, reference = present(net, PLAIN, **damping)
    _, optimizer = present(net, presentation, **damping)
    reference.refresh()
    optimizer.refresh()
    for name, block in optimizer.blocks.items():
        layer = model.get_submodule(name)
        gradients = {key: torch.randn_like(value) for key, value in layer.named_parameters()}
        assert_same(block.precondition(gradients), reference.blocks[name].precondition(gradients))


@pytest.mark.parametrize("update_size", ["rms", "kl_clip", "none"])
@pytest.mark.parametrize(("net", "presentation"), CASES)
def test_step_does_not_change(net: Callable[[], nn.Sequential], presentation: Presentation, update_size: str) -> None:
    move = one_step(net, presentation, update_size=update_size)
    assert_same(move, one_step(net, PLAIN, update_size=update_size))


@pytest.mark.parametrize("loss_factor", [1e-3, 1e3])
@pytest.mark.parametrize("net", [conv_net, norm_net])
def test_default_step_ignores_a_scale_it_is_not_told(net: Callable[[], nn.Sequential], loss_factor: float) -> None:
    """Relative damping and steps of root mean square 1 see no units."""
    assert_same(one_step(net, Presentation(loss_factor=loss_factor)), one_step(net, PLAIN))


def one_step(net: Callable[[], nn.Sequential], presentation: Presentation, **options: Any) -> dict[str, Tensor]:
    """Return how far the first step moves every parameter."""
    model, optimizer = present(net, presentation, lr=0.1, **options)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.step()
    return {name: value.detach() - before[name] for name, value in model.named_parameters()}
