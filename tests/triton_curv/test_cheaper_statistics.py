"""Diagonal G of layers with many outputs, and A of convolutions from a part of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import triton_curv as tc
from tests.support.capture import captured


@pytest.mark.parametrize("centred", [False, True])
def test_wide_output_has_a_diagonal_factor(centred: bool) -> None:
    """And A as it is; 64 outputs keep a whole G."""
    torch.manual_seed(0)
    x = torch.randn(20, 5, dtype=torch.float64)
    found = {}
    for limit in (64, 1000):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 65)).double()
        optimizer = captured(model, lambda m: m(x).cos().mean(), max_output_dim=limit, centred=centred, damping=0.1)
        found[limit] = {name: block.factors() for name, block in optimizer.blocks.items()}
        note = "G diagonal (65 coordinates)"
        assert (note in str(optimizer.explain())) == (limit == 64)
        optimizer.step()
        after = optimizer.blocks["2"].factors()
        assert after["G"].dim() == (1 if limit == 64 else 2)
        found[limit]["after"] = after
    narrow, whole = found[64], found[1000]
    assert torch.equal(narrow["0"]["G"], whole["0"]["G"])
    assert torch.equal(narrow["2"]["A"], whole["2"]["A"])
    for name in ("2", "after"):  # pending statistics, and those that were folded
        torch.testing.assert_close(narrow[name]["G"], whole[name]["G"].diagonal(), rtol=1e-10, atol=1e-18)


def test_centred_factor_in_diagonal_blocks() -> None:
    """The mean's outer product is taken out of each block."""
    x = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for limit in (8192, 4):
        torch.manual_seed(1)
        model = nn.Linear(5, 8).double()
        optimizer = captured(model, lambda m: m(x).cos().mean(), max_factor_dim=limit, centred=True, damping=0.1)
        found.append(optimizer.blocks[""].factors()["G"])
        optimizer.step()
        found.append(optimizer.blocks[""].factors()["G"])
    for whole, split in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(split, torch.stack([whole[:4, :4], whole[4:, 4:]]), rtol=1e-10, atol=1e-18)


def test_convolutions_take_inputs_of_the_first_samples() -> None:
    """As many as are asked for, more where they have few patches for each coordinate; G from all."""
    torch.manual_seed(0)
    x = torch.randn(40, 2, 6, 6, dtype=torch.float64)
    model = nn.Conv2d(2, 3, 3).double()
    samples = {0: 40, 16: 16, 2: 5}  # 4 * 19 coordinates / 16 positions: 5
    factors = {}
    for few in samples:
        model.zero_grad()
        optimizer = captured(model, lambda m: m(x).cos().mean(), conv_samples=few)
        factors[few] = optimizer.blocks[""].factors()
        assert torch.equal(factors[few]["G"], factors[0]["G"])
        optimizer.detach()
    for few, taken in samples.items():
        model.zero_grad()
        part = captured(model, lambda m, taken=taken: m(x[:taken]).cos().mean())  # type: ignore[misc]
        torch.testing.assert_close(factors[few]["A"], part.blocks[""].factors()["A"], rtol=1e-10, atol=1e-14)
        part.detach()
    with pytest.raises(tc.ConfigurationError, match="conv_samples"):
        tc.KFAC(model, conv_samples=-1)
