"""What class a layer was written as."""

from torch.nn import Module


def layer_kind(module: Module) -> type[Module]:
    """`type(module)`; behind the class "FSDP" + name that fully_shard puts before it, the one before that."""
    kind = type(module)
    bases = kind.__bases__
    if len(bases) == 2 and bases[0].__name__ == "FSDPModule" and bases[0].__module__.startswith("torch.distributed."):
        return bases[1]
    return kind
