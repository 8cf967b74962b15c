"""Small host tables on the device: copied once, without a synchronization, and kept while they are used.

A table is a function of the values in its key alone (shapes, strides, addresses: numbers, never tensors), so that
memory that was freed and given out again cannot make it stale. There is one copy for each stream, which a copy and
the kernels that read it then share, and the least recently used go first.

While a CUDA graph is captured, copies become part of the graph: they are made anew at each replay from host memory,
so both sides are kept as long as the process lives, and are never handed to a call outside that graph.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

Table: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def is_traced(tensor: Tensor) -> bool:
    """Whether the tensor is one of a trace (torch.compile), which has no address."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)


class _Entry(NamedTuple):
    host: Tensor
    device: Tensor


class DeviceCache:
    """At most `size` tables."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._captured: list[_Entry] = []
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Table]) -> Tensor:
        """The table for `key` on `device`; `make` gives its content, a function of `key`."""
        on_cuda = device.type == "cuda"
        capturing = on_cuda and torch.cuda.is_current_stream_capturing()
        key = (key, device, torch.cuda.current_stream(device).cuda_stream if on_cuda else 0)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                host = torch.from_numpy(make())
                host = host.pin_memory() if on_cuda else host
                entry = _Entry(host, host.to(device, non_blocking=True))
                if not capturing:
                    self._entries[key] = entry
            else:
                self._entries.move_to_end(key)
            if capturing:
                self._captured.append(entry)
            if len(self._entries) > self.size:
                self._entries.popitem(last=False)
        return entry.device
