"""Which implementation an op takes, Triton or the plain-torch reference, and what the device under it allows."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import chain
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

P = ParamSpec("P")
R = TypeVar("R")
Backend = Literal["auto", "reference", "triton"]

VARIABLE = "TRITON_CURV_BACKEND"


class BackendError(ValueError):
    """TRITON_CURV_BACKEND holds something else than "auto", "reference" or "triton"."""


class UnsupportedInputError(ValueError):
    """An op got tensors of a shape, dtype or device that it does not take."""


def _parse(value: str | None) -> Backend:
    if value is None:
        return "auto"
    name = value.strip().lower() or "auto"
    for backend in get_args(Backend):
        if name == backend:
            return backend  # type: ignore[no-any-return]  # get_args is untyped
    raise BackendError(f"expected {VARIABLE} to be one of {get_args(Backend)}, got {value!r}")


def use_reference(tensor: Tensor) -> bool:
    """Whether ops on `tensor` run their plain-torch reference instead of Triton.

    "auto" (the default): on CPU only. TRITON_CURV_BACKEND, read at each call, overrides: "reference" or "triton".

    Raises:
        BackendError: the variable has another value.

    """
    backend = _parse(os.environ.get(VARIABLE))
    return tensor.device.type == "cpu" if backend == "auto" else backend == "reference"


def wrap_triton(kernel: Callable[..., Any]) -> Any:
    """`torch.library.wrap_triton`, or the kernel itself under TRITON_INTERPRET=1 (torch 2.11 refuses those).

    It keeps torch's name: the keys of torch's compile caches come from calls of that name in an op's source.
    """
    from triton.runtime.interpreter import InterpretedFunction

    return kernel if isinstance(kernel, InterpretedFunction) else torch.library.wrap_triton(kernel)


def is_traced(*tensors: Tensor | Sequence[Tensor]) -> bool:
    """Whether one of the tensors, or of lists of them, is of a trace (torch.compile): without values or an address."""
    each = chain.from_iterable([t] if isinstance(t, Tensor) else t for t in tensors)
    return any(isinstance(t, FakeTensor | FunctionalTensor) for t in each)


def on_own_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Decorate a launcher so that the current device is the one of the first tensor among its arguments.

    Triton launches on the current device, in its current stream, wherever the tensors are. A trace launches nothing.
    """

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = _first_tensor((*args, *kwargs.values()))
        if tensor is None or tensor.device.type != "cuda" or is_traced(tensor):
            return launcher(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return launcher(*args, **kwargs)

    return launch


def _first_tensor(arguments: Iterable[object]) -> Tensor | None:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
            return argument[0]
    return None


@dataclass(frozen=True)
class DeviceLimits:
    """What a kernel's configuration depends on.

    `shared_memory`: bytes a program may use; `multiprocessors`: programs that run at a time, at least. `name` is the
    driver's ("" for no device) and `arch` "sm_90" or "gfx942", say: devices with equal limits differ in speed.
    """

    platform: Literal["cuda", "hip"] = "cuda"
    multiprocessors: int = 132
    shared_memory: int = 227 * 1024
    name: str = ""
    arch: str = ""


def is_blackwell(limits: DeviceLimits) -> bool:
    """B200 and B300, where accumulators of 16-bit products lie in tensor memory."""
    return limits.arch.startswith("sm_10")


NO_DEVICE = DeviceLimits()  # those of an H100: what tracing and offline compilation assume


@lru_cache(maxsize=64)
def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of `device`; `NO_DEVICE` if there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return NO_DEVICE
    properties = torch.cuda.get_device_properties(device)
    name, multiprocessors = properties.name, properties.multi_processor_count
    if torch.version.hip is not None:
        arch = str(properties.gcnArchName).partition(":")[0]
        return DeviceLimits("hip", multiprocessors, 64 * 1024, name, arch)
    shared_memory = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # not in torch's stub
    arch = f"sm_{properties.major}{properties.minor}"
    return DeviceLimits("cuda", multiprocessors, shared_memory, name, arch)
