"""Which configuration a kernel runs with: overrides, then what this process learned, then the kernel's own default."""

from triton_curv_autotune.resolve import UnknownOpError, learn, override, resolve

__all__ = ["UnknownOpError", "learn", "override", "resolve"]
