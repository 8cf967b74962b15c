"""Taps: how layer inputs and output gradients reach the factors."""

from triton_curv.capture.attach import Handle, attach_taps
from triton_curv.capture.tap import CaptureSwitch

__all__ = ["CaptureSwitch", "Handle", "attach_taps"]
