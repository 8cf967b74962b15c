"""One net of all layer kinds, trained in every way: its factors are those of one plain pass in float64.

That those are right is what the tests of each kind show, against dense oracles.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tests.support.capture import kfac
from tests.support.dense import relative_error
from triton_curv.blocks import NormFisher

Factors = dict[tuple[str, str], Tensor]
NORM_FORMS: list[NormFisher] = ["unit", "diagonal", "full"]


class Every(nn.Module):
    """Convolutions of all sorts, all norms, attention, a layer called twice, an adapter on a frozen base.

    BatchNorm uses running statistics: with those of the batch, samples are not apart. `recompute` is "", "reentrant"
    or "not reentrant" activation checkpointing of the whole.
    """

    def __init__(self, inplace: bool = False, recompute: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recompute = recompute
        self.act = nn.ReLU(inplace=inplace)
        self.grouped, self.batch_norm = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.up, self.instance = nn.ConvTranspose2d(4, 4, 2, 2), nn.InstanceNorm2d(4, affine=True)
        self.depthwise, self.group = nn.Conv2d(4, 4, 3, 2, groups=4, bias=False), nn.GroupNorm(2, 4)
        self.flat, self.solid = nn.Conv1d(4, 6, 3, padding=1), nn.Conv3d(1, 3, (2, 4, 4))
        self.layer, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.rms, self.twice = nn.RMSNorm(6), nn.Linear(6, 6)
        self.base, self.down, self.back = nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.base.requires_grad_(False)
        self.head = nn.Linear(6, 3)
        for norm in (self.batch_norm, self.instance, self.group, self.layer, self.rms):
            nn.init.normal_(norm.get_parameter("weight"), 1.0, 0.2)

    def body(self, x: Tensor) -> Tensor:
        """Scores (samples, 3)."""
        x = self.act(self.batch_norm(self.grouped(x)))
        x = self.act(self.instance(self.up(x)))
        x = self.act(self.group(self.depthwise(x)))
        solid = self.solid(x[:, None]).flatten(2).mean(2)
        x = self.flat(x.flatten(2)).mT
        y = self.layer(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = self.act(self.twice(torch.tanh(self.twice(self.rms(x)))))
        x = self.base(x) + self.back(self.down(x))
        out: Tensor = self.head(x.mean(1)) + solid
        return out

    def forward(self, x: Tensor) -> Tensor:
        """`body`, recomputed or not."""
        if self.recompute:
            out: Tensor = checkpoint(self.body, x, use_reentrant=self.recompute == "reentrant")
            return out
        return self.body(x)


def factors(
    pieces: int = 1, amp: torch.dtype | None = None, compiled: bool = False, form: NormFisher = "unit", **how: Any
) -> Factors:
    """Of a batch in `pieces`; in mixed precision with a GradScaler; under torch.compile."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 2, 6, 6, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, 3, (16,), generator=generator)
    model = Every(**how).to(torch.float64 if amp is None else torch.float32)
    model.batch_norm.eval()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=amp is not None)
    optimizer = kfac(model, norm_fisher=form, grad_scaler=scaler)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for part, target in zip(x.to(model.head.weight.dtype).chunk(pieces), y.chunk(pieces), strict=True):
        with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
            loss = cross_entropy(run(part), target) / pieces
        scaler.scale(loss).backward()
    return {(n, f): v.double() for n, block in optimizer.blocks.items() for f, v in block.factors().items()}


plain = cache(lambda form: factors(form=form))


def assert_close(found: Factors, tolerance: float, form: NormFisher = "unit") -> None:
    expected = plain(form)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(found[key], value) < tolerance, key


def test_every_layer_has_its_block() -> None:
    names = {name for name, _ in plain("unit")}
    frozen = {name for name, p in Every().named_parameters() if name.startswith("base")}
    assert frozen == {"base.weight", "base.bias"}
    assert names == {n for n, m in Every().named_modules() if any(True for _ in m.parameters(recurse=False))} - {"base"}


@pytest.mark.parametrize("form", NORM_FORMS)
@pytest.mark.parametrize("recompute", ["", "reentrant", "not reentrant"])
def test_in_place_recomputed_and_in_micro_batches(form: NormFisher, recompute: str) -> None:
    assert_close(factors(pieces=4, form=form, inplace=True, recompute=recompute), 1e-12, form)


@pytest.mark.parametrize("form", NORM_FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.005)])
def test_in_mixed_precision(form: NormFisher, dtype: torch.dtype, tolerance: float) -> None:
    found = factors(pieces=2, amp=dtype, form=form, inplace=True, recompute="not reentrant")
    assert_close(found, tolerance, form)


def test_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()
    assert_close(factors(compiled=True, inplace=True), 1e-12)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()
