"""Two runs make the whole suite, since one process cannot both interpret and compile Triton kernels.

`TRITON_INTERPRET=1 pytest -m interpreter` runs the kernels in Triton's interpreter (with bfloat16 repaired);
`pytest -m "not interpreter and not gpu"` compiles them, for GPUs that are not here, and runs all the rest.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure() -> None:
    if INTERPRETING:
        from tests.support import interp_bf16

        interp_bf16.install()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("interpreter") and not INTERPRETING:
        pytest.fail(
            "this test needs the interpreter: run `TRITON_INTERPRET=1 pytest -m interpreter`, and the others with "
            '`pytest -m "not interpreter and not gpu"`',
            pytrace=False,
        )
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, torch sees none")
