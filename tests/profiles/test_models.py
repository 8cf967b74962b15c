"""The benchmark models are the ones they are named after: parameters as published, gradients everywhere."""

import pytest
import torch

from profiles.models import gpt2, resnet50, vit_b16


@pytest.mark.parametrize(("build", "parameters"), [(resnet50, 25_557_032), (gpt2, 124_439_808), (vit_b16, 86_567_656)])
def test_parameter_count(build: type[torch.nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_small_copies_train_every_parameter() -> None:
    torch.manual_seed(0)
    models = [
        (resnet50(5, depths=(1, 1), width=4), torch.randn(2, 3, 32, 32)),
        (gpt2(11, 6, 8, 2, 2), torch.randint(11, (2, 6))),
        (vit_b16(5, 32, 8, 2, 2), torch.randn(2, 3, 32, 32)),
    ]
    for model, x in models:
        model(x).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
