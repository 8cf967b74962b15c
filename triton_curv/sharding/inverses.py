"""What follows an inversion: the inverses to those who apply them, and one status word to all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_curv.blocks import FactorStore
from triton_curv.blocks.bank import FactorKey
from triton_curv.packing import pack, packed_size, unpack
from triton_curv.sharding.exchange import gather_pieces
from triton_curv.sharding.plan import Plan
from triton_curv.sharding.ranks import Channels


def share_inverses_(store: FactorStore, plan: Plan, channels: Channels, keys: Sequence[FactorKey]) -> None:
    """The inverses (packed) or eigenbases of `keys` to all ranks of their column, their owners included."""
    due = set(keys)
    by_row: list[list[FactorKey]] = [[] for _ in range(plan.grid.rows)]
    for layer in plan.layers_of(channels.place):
        for factor, place in zip(plan.layers[layer].factors, plan.inverters[layer], strict=True):
            if FactorKey(layer, factor.name) in due:
                by_row[place].append(FactorKey(layer, factor.name))
    mine = by_row[channels.column.rank]
    own = [part for key in mine for part in _parts(store, key)]
    sizes = [[size for key in row for size in _sizes(store, key)] for row in by_row]
    received = gather_pieces(channels.column, own, sizes, store.samples)
    for row, pieces in zip(by_row, received, strict=True):
        rest = iter(pieces)
        for key in row:
            _take_(store, key, [next(rest) for _ in _sizes(store, key)])


def _parts(store: FactorStore, key: FactorKey) -> list[Tensor]:
    inverses, failures = store.view("inverses", key), store.failures[store.rows(key)].to(store.samples.dtype)
    if store.has_spectra(key):
        return [inverses, store.view("spectra", key), failures]
    return [pack(inverses), failures]


def _sizes(store: FactorStore, key: FactorKey) -> list[int]:
    inverses = store.view("inverses", key)
    batch, n, _ = inverses.shape
    return [batch * n * n, batch * n, batch] if store.has_spectra(key) else [batch * packed_size(n), batch]


def _take_(store: FactorStore, key: FactorKey, parts: Sequence[Tensor]) -> None:
    inverses, rows = store.view("inverses", key), store.rows(key)
    n = inverses.shape[-1]
    if store.has_spectra(key):
        inverses.copy_(parts[0].view_as(inverses))
        spectra = store.view("spectra", key)
        spectra.copy_(parts[1].view_as(spectra))
    else:
        inverses.copy_(unpack(parts[0].reshape(-1, packed_size(n)), n))
    store.failures[rows] = parts[-1].to(store.failures.dtype)


def share_status_(store: FactorStore, channels: Channels, failed_before: Tensor) -> None:
    """One all-reduce: how inversions went, so that `health()` says the same on all ranks.

    Of factors of other ranks the worst of their matrices is known.
    """
    if channels.replica.size == 1:
        return
    dtype = store.samples.dtype
    vectors = (store.residuals, store.failures, store.rungs)
    words = torch.zeros(len(vectors), len(store.keys), dtype=dtype, device=store.samples.device)
    for i, key in enumerate(store.keys):
        if store.owns(key):
            words[:, i] = torch.stack([vector[store.rows(key)].amax().to(dtype) for vector in vectors])
    failed = (store.failed - failed_before).to(dtype).view(1)
    total = channels.replica.all_reduce(torch.cat((words.view(-1), failed))).wait()
    of_row = total[:-1].view_as(words)[:, store.key_of_row]
    # failures raise the damping in an eigenbasis: whoever has that has been told each matrix's
    for vector, values, known in zip(vectors, of_row, (store.owns, store.serves, store.owns), strict=True):
        has = torch.tensor([known(key) for key in store.keys], device=store.key_of_row.device)[store.key_of_row]
        vector.copy_(torch.where(has, vector, values.to(vector.dtype)))
    store.failed.copy_(failed_before + total[-1].to(store.failed.dtype))
