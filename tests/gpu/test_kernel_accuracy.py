"""Each benchmark case on the device: error against a float64 oracle at most twice the library's own, and repeatable."""

from collections.abc import Iterator

import pytest
import torch

from profiles.bench_kernels import cases_of, op_names


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Keep tf32 out of the library's calls: the error allowed is that of true float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("op", op_names())
def test_error_is_at_most_twice_the_librarys(op: str, device: torch.device) -> None:
    checked = 0
    for case in cases_of(op, device, quick=True):
        error, allowed = case.error(), case.allowed_error()
        assert error <= allowed, f"{case.op} {case.name}: error {error:.2e}, allowed {allowed:.2e}"
        checked += 1
    assert checked
