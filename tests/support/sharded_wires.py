"""What ranks do in the tests of dtypes on the way, of counted bytes, and of a rank that dies in a step."""

import os
import time
from typing import Any

import torch
from torch.nn import functional

from tests.support.sharded import Case, batch, packed, share, together, trained
from triton_curv.sharding.team import Team

WIRES: dict[str, torch.dtype | None] = {
    "own": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def wires(rank: int, world: int) -> Any:
    """Three steps with each dtype on the way, under both wrappers, and the bytes that were sent."""
    found: dict[str, Any] = {}
    for wrapper in ("none", "fsdp"):
        for name, wire in WIRES.items():
            case = Case(
                wrapper, sharding={"wire": wire, "gather": "inverses" if wrapper == "none" else "gradients"}, steps=3
            )
            found[f"{wrapper} {name}"] = trained(case, rank, world)
    return packed(found)


def counted(rank: int, world: int) -> Any:
    """Bytes of one step that takes statistics and inverts, and of one that does neither, for each placement."""
    found: dict[str, Any] = {}
    for gather in ("gradients", "inverses"):
        model, optimizer = together(Case("ddp", sharding={"gather": gather, "collectives": "uneven", "overlap": False}))
        exchange = optimizer._exchange
        assert isinstance(exchange, Team)
        ledger: dict[str, int] = {}
        for i in range(2):
            before = ledger
            optimizer.zero_grad()
            x, y = share(batch(i), rank, world)
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            ledger = dict(exchange.channels.ledger.sent)
            found[f"{gather} {i}"] = {kind: count - before.get(kind, 0) for kind, count in ledger.items()}
        store = optimizer._store
        found["triangles"] = sum(len(bank.sums) * bank.size * (bank.size + 1) // 2 for bank in store.banks)
        found["matrices"] = {name: block.matrix_size for name, block in optimizer.blocks.items()}
    return packed(found)


def dying(rank: int, world: int) -> Any:
    """The last rank dies before its step; the others say what they got and after how long."""
    model, optimizer = together(Case("none"))
    x, y = share(batch(0), rank, world)
    functional.cross_entropy(model(x), y).backward()
    if rank == world - 1:
        os._exit(9)
    began = time.monotonic()
    try:
        optimizer.step()
    except RuntimeError as error:
        return f"{type(error).__name__} after {time.monotonic() - began:.1f} s"
    return "no error"
