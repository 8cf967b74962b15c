"""Small host tables on the device: copied once, without a synchronization, and kept while they are used.

A table is a function of the values in its key alone (shapes, strides, addresses: numbers, never tensors), so that
memory that was freed and given out again cannot make it stale. There is one copy for each stream, which a copy and
the kernels that read it then share, and the least recently used go first.

While a CUDA graph is captured, copies become part of the graph: they are made anew at each replay from host memory,
so both sides are kept as long as the process lives, and are never handed to a call outside that graph.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class _Entry(NamedTuple):
    host: Tensor
    device: Tensor


class DeviceCache:
    """At most `size` tables."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self.captured: list[_Entry] = []

    def get(self, key: Hashable, device: torch.device, make: Callable[[], "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"]) -> Tensor:
        """The table for `key` on `device`; `make` gives its content, a function of `key`."""
        on_cuda = device.type == "cuda"
        capturing = on_cuda and torch.cuda.is_current_stream_capturing()
        key = (key, device, torch.cuda.current_stream(device).cuda_stream if on_cuda else 0)
        entry = self.entries.get(key)
        if entry is not None:
            self.entries.move_to_end(key)
            if capturing:
                self.captured.append(entry)
            return entry.device
        host = torch.from_numpy(make())
        if on_cuda:
            host = host.pin_memory()
        entry = _Entry(host, host.to(device, non_blocking=True))
        if capturing:
            self.captured.append(entry)
        else:
            self.entries[key] = entry
            if len(self.entries) > self.size:
                self.entries.popitem(last=False)
        return entry.device
