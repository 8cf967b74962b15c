# mypy: ignore-errors
# (it patches untyped internals of Triton's interpreter)
"""Make TRITON_INTERPRET=1 compute bfloat16 correctly; `tests/conftest.py` installs it, tests need do nothing.

Triton 3.6 to 3.9 keep bfloat16 as raw uint16 there: `tl.dot`, arithmetic and math functions work on the bit patterns
(silently wrong by 1e11), and float32 -> bfloat16 truncates instead of rounding to nearest even.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder

# builder method -> number of leading tensor operands
ARITHMETIC = {"binary_op": 2, "unary_op": 1, "create_fma": 3, "create_rsqrt": 1, "create_erf": 1}


def widen(bits: np.ndarray) -> np.ndarray:
    """Bfloat16 bit patterns (uint16) -> float32."""
    bits = np.ascontiguousarray(bits)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(bits.shape)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns (uint16), rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16).reshape(values.shape)


def install() -> None:
    """Patch the interpreter, once a process."""
    if getattr(Builder, "_computes_bf16", False):
        return
    Builder._computes_bf16 = True
    _patch_casts()
    for name, operands in ARITHMETIC.items():
        _patch_arithmetic(name, operands)
    _patch_dot()
    # Triton 3.6 and 3.7 ask for a bfloat16 constant when a Python float meets a bfloat16 tensor
    Builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value])), tl.bfloat16)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _as_float32(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _patch_casts() -> None:
    convert, cast = interpreter._convert_float, Builder.cast_impl

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.bfloat16 and target == tl.float32:
            return widen(values).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16 and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return narrow(values.view(np.float32) if values.dtype == np.uint32 else values)
        return convert(values, source, target, rounding)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            return Handle(widen(source.data).astype(interpreter._get_np_dtype(target)), target.scalar)
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    interpreter._convert_float, Builder.cast_impl = convert_float, cast_impl


def _patch_arithmetic(name: str, operands: int) -> None:
    original = getattr(Builder, name)

    def method(self: Any, *args: Any) -> Any:
        handles, rest = args[:operands], args[operands:]
        if not any(isinstance(h, Handle) and _is_bf16(h) for h in handles):
            return original(self, *args)
        result = original(self, *map(_as_float32, handles), *rest)
        return result if result.data.dtype == np.bool_ else Handle(narrow(result.data), tl.bfloat16)

    setattr(Builder, name, method)


def _patch_dot() -> None:
    original = Builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if _is_bf16(a) or _is_bf16(b):
            a, b = _as_float32(a), _as_float32(b)
        return original(self, a, b, *rest)

    Builder.create_dot = create_dot
