"""DTensors and the part of them that lies on this rank."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies on this rank, sharing its memory; any other tensor itself."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, whole: Tensor) -> Tensor:
    """`part` as this rank's part of a DTensor with the mesh and placements of `whole`; itself if that is none."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def assign_(target: Tensor, given: Tensor) -> None:
    """`target.copy_(given)`, either of which may be a DTensor. A collective if `given` is sharded another way."""
    if not isinstance(target, DTensor):
        target.copy_(given.full_tensor() if isinstance(given, DTensor) else given)
        return
    if isinstance(given, DTensor):
        if given.device_mesh == target.device_mesh and given.placements == target.placements:
            target.to_local().copy_(given.to_local())
            return
        given = given.full_tensor()
    given = given.to(target.device)
    part = distribute_tensor(given, target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(part.to_local())
