"""K-FAC without damping does not see affine changes of a layer's inputs and outputs (Martens and Grosse 2015, 10.1).

A twin net computes the same function with other weights: between its layers fixed affine maps are put in, and undone by
the weights. One undamped step must lead both to the same function; a step of SGD does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import triton_curv as tc
from tests.support.capture import kfac

Layer = nn.Linear | nn.Conv2d


class Affine(nn.Module):
    """x -> M x + v over the channels (dimension 1), fixed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.M = torch.eye(width, dtype=torch.float64) + 0.4 * torch.randn(width, width, dtype=torch.float64)
        self.v = torch.randn(width, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = torch.tensordot(x.movedim(1, -1), self.M.T, dims=1) + self.v
        return moved.movedim(-1, 1)


class Undone(Affine):
    """The inverse map, M^-1 (x - v)."""

    def __init__(self, other: Affine) -> None:
        nn.Module.__init__(self)
        self.M = torch.linalg.inv(other.M)
        self.v = -self.M @ other.v


def twin_layer(layer: Layer) -> nn.Sequential:
    """The same function of the same input: y = U_out (W' (U_in x) + b'), W' and b' absorb both maps."""
    inwards, outwards = Affine(layer.weight.shape[1]), Affine(layer.weight.shape[0])
    back = Undone(inwards)
    weight = layer.weight.detach()
    flat = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    moved = torch.einsum("ab,bck,cd->adk", outwards.M, flat, back.M)
    twin = copy.deepcopy(layer)
    assert twin.bias is not None
    bias = twin.bias.detach() + torch.einsum("ock,c->o", flat, back.v)  # what the shift of the inputs adds
    with torch.no_grad():
        twin.weight.copy_(moved.reshape(weight.shape))
        twin.bias.copy_(outwards.M @ bias + outwards.v)
    return nn.Sequential(inwards, twin, Undone(outwards))


def mlp() -> list[nn.Module]:
    return [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]


def conv_net() -> list[nn.Module]:
    return [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, (1, 2), stride=(1, 2)), nn.Flatten()]


CASES: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "conv": (conv_net, (2, 3, 5)),
}


def moved(layers: list[nn.Module], x: Tensor, y: Tensor, step: Callable[[nn.Module], Any]) -> tuple[Tensor, Tensor]:
    """What the net says before and after one step."""
    model = nn.Sequential(*map(copy.deepcopy, layers))
    before = model(x).detach()
    optimizer = step(model)
    output = model(x)
    if isinstance(optimizer, tc.KFAC):
        optimizer.sample_fisher(output, "mse")
    mse_loss(output, y).backward()
    optimizer.step()
    return before, model(x).detach()


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_undamped_steps_do_not_see_affine_maps_between_layers(
    case: tuple[Callable[[], list[nn.Module]], tuple[int, ...]], inverse: Any
) -> None:
    torch.manual_seed(0)
    layers = [layer.double() for layer in case[0]()]
    x = torch.randn(60, *case[1], dtype=torch.float64)
    twins = [twin_layer(layer) if isinstance(layer, Layer) else layer for layer in layers]
    with torch.no_grad():
        y = torch.randn_like(nn.Sequential(*layers)(x))

    def undamped(model: nn.Module) -> tc.KFAC:
        settings: dict[str, Any] = {"lr": 0.3, "momentum": 0.0, "update_size": "none", "fisher": "sampled"}
        return kfac(model, damping=1e-16, inverse=inverse, **settings)

    for step, same in ((undamped, True), (lambda model: torch.optim.SGD(model.parameters(), 0.3), False)):
        starts, ends = zip(*(moved(net, x, y, step) for net in (layers, twins)), strict=True)
        torch.testing.assert_close(starts[1], starts[0], rtol=1e-9, atol=1e-9)
        change, difference = float((ends[0] - starts[0]).norm()), float((ends[1] - ends[0]).norm())
        assert change > 1e-2
        assert (difference < 1e-3 * change) == same, difference / change
