"""How much memory a call allocates at a time, on tensors of any device, "meta" as well."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from triton_curv_kernels import factor, patch, patch_pixel_rows


class _Recorder(TorchDispatchMode):
    """Storages that operations return and that they did not get."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in given:
                self.live.setdefault(key, (StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def peak_allocated(call: Callable[[], object]) -> int:
    """Most bytes that tensors made inside `call` take at one time."""
    recorder = _Recorder()
    with recorder:
        call()
    return recorder.peak


class _Nothing:
    """A kernel whose launches do nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Launchers of factors do all but launch: for tensors without memory."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (factor, patch, patch_pixel_rows):
            patched.setattr(module, "wrap_triton", lambda _: _Nothing())
        yield


def unfolded_bytes(input: Tensor, kernel_positions: int, outputs: int) -> int:
    """What `torch.nn.functional.unfold` takes: patches of all channels at each output position of each sample."""
    return input.shape[0] * outputs * kernel_positions * input.shape[1] * input.itemsize
