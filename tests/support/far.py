"""Tensors whose elements lie more than 2^31 apart, and a copy of the kernels whose offsets have only 32 bits.

Memory is reserved, not committed: only the pages a kernel touches exist. Tensors begin in its middle, so that an offset
which wraps at 32 bits lands in the same memory, on zeros, and shows in the result instead of crashing.
"""

import importlib
import mmap
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import triton_curv_kernels

MAP_NORESERVE = 0x4000  # Linux's; Python 3.11 has no name for it
FAR = 1 << 28  # 8 such steps leave 32 bits
NEAR = 1 << 7
NARROW = "triton_curv_kernels_narrow"


def reserved(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


def reserved_amid(numel: int, dtype: torch.dtype, far: int) -> Tensor:
    """The same between zeros that reach as far as an offset of 32 bits can go astray, if `far` is FAR."""
    astray = 32 * FAR if far == FAR else 0  # an address may go astray in several steps
    return reserved(astray + max(numel, astray), dtype)[astray : astray + numel]


def apart(values: Tensor, far: int, dim: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """A copy with `far` elements between neighbours along `dim`, in which the other dimensions lie close together."""
    sizes = values.shape
    others = [size for place, size in enumerate(sizes) if place != dim]
    strides = [prod(others[place + 1 :]) for place in range(len(others))]
    strides.insert(dim, far)
    assert prod(others) <= far, "expected neighbours that do not overlap"
    memory = reserved_amid(sizes[dim] * far, dtype or values.dtype, far)
    return memory.as_strided(sizes, strides).copy_(values)


@contextmanager
def last_program_only() -> Iterator[None]:
    """Let Triton's interpreter run the last program of each launch, as if all others had run."""
    run = interpreter.GridExecutor.__call__
    place = interpreter.interpreter_builder.set_grid_idx
    size = interpreter.interpreter_builder.set_grid_dim

    def run_last(self: Any, *args: Any, **kwargs: Any) -> None:
        whole, self.grid = self.grid, (1,)
        with pytest.MonkeyPatch.context() as patch:
            last = [count - 1 for count in (*whole, 1, 1)[:3]]
            patch.setattr(interpreter.interpreter_builder, "set_grid_dim", lambda *_: size(*(*whole, 1, 1)[:3]))
            patch.setattr(interpreter.interpreter_builder, "set_grid_idx", lambda *_: place(*last))
            run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", run_last)
        yield


# what a kernel file reads from tables of int64, besides addresses: sizes, strides and places
TABLES: dict[str, tuple[tuple[str, str], ...]] = {
    "pointer_table_device.py": (
        (r"\(entry & 0xFFFFFFFF\)", r"\g<0>.to(tl.int32)"),
        (r"tl\.load\((strides|record)( \+ [123])?\)", r"\g<0>.to(tl.int32)"),
    ),
    "apply_inverse_kernels.py": (
        (r"value = tl\.load\(matrix \+ COLUMN\)", r"\g<0>.to(tl.int32)"),
        (r"tl\.load\((matrix|program) \+ \d+\)", r"\g<0>.to(tl.int32)"),
    ),
    "damped_inverse_kernels.py": ((r"tl\.load\(matrices \+ m \* 6( \+ \d)?\)", r"\g<0>.to(tl.int32)"),),
    "symmetric.py": ((r"tl\.load\(row \+ [1-4]\)", r"\g<0>.to(tl.int32)"),),
    "factor_group_kernels.py": ((r"tl\.load\((item|row) \+ \d\)", r"\g<0>.to(tl.int32)"),),
}
ADDRESSES = ("scale_ptr.to(tl.int64)",)


def narrow(name: str, source: str) -> str:
    """A file of the package, with 32 bits wherever its kernels ask for 64."""
    for pattern, replacement in TABLES.get(name, ()):
        source, count = re.subn(pattern, replacement, source)
        assert count, f"expected {pattern} in {name}, whose tables must be narrowed, too"
    for address in ADDRESSES:
        source = source.replace(address, address.replace("tl.", "tl .", 1))
    source = source.replace("tl.int64", "tl.int32").replace("tl .int64", "tl.int64")
    return source.replace("triton_curv_kernels", NARROW).replace("triton_curv::", f"{NARROW}::")


@cache
def narrowed() -> str:
    """Import the whole package once more, narrowed; its ops are apart from the real ones. The name of the copy."""
    folder = Path(tempfile.mkdtemp())
    (folder / NARROW).mkdir()
    for path in Path(str(triton_curv_kernels.__file__)).parent.glob("*.py"):
        (folder / NARROW / path.name).write_text(narrow(path.name, path.read_text()))
    sys.path.insert(0, str(folder))
    importlib.import_module(NARROW)
    return NARROW


class Kernels:
    """The files of the package or of its narrowed copy: `Kernels(name).factor.launch_accumulate_factor_`."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __getattr__(self, file: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{file}")
