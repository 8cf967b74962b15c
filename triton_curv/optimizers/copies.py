"""Lives of optimizers that hold on to their model: copies work on the copied model, a deleted one leaves it alone."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, Self, TypeVar

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from triton_curv.capture import Handle

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def weakly(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A bound method that does not keep its object alive: the model's taps are not to hold the optimizer."""
    reference = weakref.WeakMethod(method)

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        found = reference()
        if found is None:
            raise ReferenceError("the optimizer of these blocks was deleted")
        return found(*args, **kwargs)

    return call


def release_with(optimizer: Optimizer, handles: Iterable[Handle]) -> None:
    """Take taps off the model when its optimizer is deleted; they would hold all factors, and add to them for ever."""
    weakref.finalize(optimizer, _remove, list(handles)).atexit = False


def _remove(handles: list[Handle]) -> None:
    for handle in handles:
        handle.remove()


class Rebuilt(Optimizer):
    """An optimizer that is built anew where it is copied or unpickled, and then takes over the state.

    torch copies state and groups, nothing else; what is tied to the model's modules (taps, names, buffers that share
    memory) has to be made for the copied model. Copy model and optimizer together, `copy.deepcopy((model, optimizer))`,
    as you would with any torch optimizer. Statistics that no step has used are left behind.
    """

    _names: dict[Any, str]  # of parameters
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    _late: list[dict[str, Any]]  # groups that came after construction

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An empty optimizer that knows what it is being built from."""
        new = super().__new__(cls)
        new._arguments, new._late = (args, kwargs), []
        return new

    def state_dict(self) -> dict[str, Any]:
        """`Optimizer.state_dict`, and the names of the parameters in its order under "names"."""
        names = [self._names[p] for group in self.param_groups for p in group["params"]]
        return {**super().state_dict(), "names": names}

    def __getstate__(self) -> dict[str, Any]:
        """What the optimizer was built from, and its state dict."""
        return {
            "arguments": self._arguments,
            "groups": [group["params"] for group in self.param_groups],
            "late": [next(i for i, group in enumerate(self.param_groups) if group is late) for late in self._late],
            "state_dict": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the optimizer on the copied model, now or, where that is not complete yet, when it is first used."""
        model = self._model_in(state)
        self.__dict__["_unbuilt"] = state
        if "_modules" in model.__dict__:
            self._build_copy()

    def __getattr__(self, name: str) -> Any:
        """Attributes of a copy that was part of its model: there the optimizer is copied before the model is."""
        if "_unbuilt" not in self.__dict__:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        self._build_copy()
        return getattr(self, name)

    @staticmethod
    def _model_in(state: dict[str, Any]) -> nn.Module:
        args, kwargs = state["arguments"]
        model: nn.Module = args[0] if args else kwargs["model"]
        return model

    def _build_copy(self) -> None:
        state = self.__dict__.pop("_unbuilt")
        args, kwargs = self._arguments = state["arguments"]
        self._late = []
        groups: list[list[Parameter]] = state["groups"]
        at_first = {id(p) for i, params in enumerate(groups) if i not in state["late"] for p in params}
        flags = [(p, p.requires_grad) for p in self._model_in(state).parameters()]
        for p, _ in flags:  # as they were when the original was built
            p.requires_grad_(id(p) in at_first)
        type(self).__init__(self, *args, **kwargs)
        for p, flag in flags:
            p.requires_grad_(flag)
        for i in state["late"]:
            self.add_param_group({"params": groups[i]})
        self.load_state_dict(state["state_dict"])
