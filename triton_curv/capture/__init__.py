"""Taps: how layer inputs and output gradients reach the factors."""

from triton_curv.capture.tap import CaptureSwitch, attach_taps

__all__ = ["CaptureSwitch", "attach_taps"]
