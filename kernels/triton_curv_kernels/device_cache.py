"""Small host tables on the device: copied once, without a synchronization, and kept while they are used.

Tables are functions of the values in their key alone (shapes, strides, addresses: numbers, never tensors), so that
memory that was freed and given out again cannot make them stale. There is one copy for each stream, which a copy and
the kernels that read it then share, and the least recently used go first.

While a CUDA graph is captured, copies become part of the graph: they are made anew at each replay from host memory,
so both sides are kept as long as the process lives, and are never handed to a call outside that graph.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Table: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[Any]]
"""Integers."""


class _Entry(NamedTuple):
    host: tuple[Tensor, ...]
    device: tuple[Tensor, ...]


class DeviceCache:
    """The tables of at most `size` keys."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._captured: list[_Entry] = []
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Sequence[Table]]) -> tuple[Tensor, ...]:
        """The tables for `key` on `device`; `make` gives their content, a function of `key`."""
        on_cuda = device.type == "cuda"
        capturing = on_cuda and torch.cuda.is_current_stream_capturing()
        key = (key, device, torch.cuda.current_stream(device).cuda_stream if on_cuda else 0)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                tables = map(torch.from_numpy, make())
                host = tuple(table.pin_memory() if on_cuda else table for table in tables)
                entry = _Entry(host, tuple(table.to(device, non_blocking=True) for table in host))
                if not capturing:
                    self._entries[key] = entry
            else:
                self._entries.move_to_end(key)
            if capturing:
                self._captured.append(entry)
            if len(self._entries) > self.size:
                self._entries.popitem(last=False)
        return entry.device
