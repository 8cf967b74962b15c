"""What products are taken of: a model's parameters, or whole copies of those that FSDP2 has sharded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

Context = Callable[[], AbstractContextManager[Any]]


class Weights:
    """The parameters as they are: what each rank differentiates by and moves.

    `tensors` stand for the parameters, in their order. `stand_ins` are put in the model's place in every pass,
    `around_first` and `around_again` are entered around the first pass of a step and around its repetitions.
    """

    stand_ins: Mapping[Tensor, Tensor] = {}
    around_first: Context = nullcontext
    around_again: Context = nullcontext

    def __init__(self, params: Sequence[Parameter]) -> None:
        self.params = list(params)
        self.tensors: list[Tensor] = list(params)

    def own(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The parts of whole vectors that this rank keeps as state."""
        return list(vectors)

    def kept(self, states: Sequence[Tensor]) -> list[Tensor]:
        """State tensors as this rank keeps them; writing to them writes to the state."""
        return list(states)

    def whole(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Whole vectors from state tensors."""
        return list(states)

    def write_back(self) -> None:
        """Bring what was done to `tensors` into the parameters."""


class ReplicatedWeights(Weights):
    """`Weights` of a model in DDP, whose reducer and buffers' broadcast stay out of repeated passes."""

    def __init__(self, params: Sequence[Parameter], ddp: DistributedDataParallel) -> None:
        super().__init__(params)
        self.around_again = ddp.no_sync


class GatheredWeights(Weights):
    """Whole copies of all parameters that FSDP2 shards, on every rank; its hooks are off in passes with them.

    autograd.grad and forward AD can't go through FSDP2's parameters (COMPILE_AND_DIST 4.2). Passes run in the dtype of
    the parameters, whatever the mixed-precision policy says. State stays sharded as the parameters are.
    """

    def __init__(self, params: Sequence[Parameter], model: nn.Module) -> None:
        super().__init__(params)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        with torch.no_grad():
            self.stand_ins = {p: whole_of(p).requires_grad_(p.requires_grad) for p in model.parameters()}
        self.tensors = [self.stand_ins[p] for p in params]
        self.around_first = self.around_again = lambda: without_fsdp_hooks(model)

    def own(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Local shards of whole vectors."""
        return [shard_of(vector, p) for vector, p in zip(vectors, self.params, strict=True)]

    def kept(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Local shards of the state."""
        return [local_of(state) for state in states]

    def whole(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Gathered from all ranks."""
        return [whole_of(state) for state in states]

    def write_back(self) -> None:
        """Copy this rank's shards into the parameters."""
        for p, tensor in zip(self.params, self.tensors, strict=True):
            local_of(p.detach()).copy_(shard_of(tensor.detach(), p))


def local_of(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this rank holds, sharing its memory; another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_of(tensor: Tensor) -> Tensor:
    """A fresh whole copy of a DTensor, gathered from all ranks, or of another tensor."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank holds of the DTensor `like`; no communication."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


@contextmanager
def without_fsdp_hooks(model: nn.Module) -> Iterator[None]:
    """Let passes through the model take its tensors as they are: no gathering, no resharding, no casts."""
    removed: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(_is_of_fsdp(hook) for hook in hooks.values()):
                removed.append((hooks, dict(hooks)))
                for key in [key for key, hook in hooks.items() if _is_of_fsdp(hook)]:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in removed:
            hooks.clear()
            hooks.update(before)


def _is_of_fsdp(hook: Any) -> bool:
    while hook is not None:
        if isinstance(getattr(hook, "__self__", None), FSDPState):
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False
