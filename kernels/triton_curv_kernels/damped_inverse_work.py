"""Work lists of `damped_inverse_`: where matrices lie in the padded workspaces, and which program does which tile."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triton_curv_kernels.device_cache import DeviceCache, Table

DTYPES = {4: torch.int32, 8: torch.int64}
GROUP = 8  # rows of tiles whose programs follow each other, so that they share columns in the L2 cache

_kept = DeviceCache(64)


class Bank(NamedTuple):
    """Matrices (batch, n, n) in a workspace: padded to a multiple of a tile, from `offset` on."""

    batch: int
    n: int
    padded: int
    offset: int

    def view(self, workspace: Tensor) -> Tensor:
        """The matrices in a workspace, without their padding."""
        strides = (self.padded**2, self.padded, 1)
        return workspace.as_strided((self.batch, self.n, self.n), strides, self.offset)


class Work(NamedTuple):
    """Tables on the device and what the host must know of them.

    `matrices` (matrices, 6): offset, n, padded n, first of its tiles, first of its panels, place in the result.
    `tiles` (tiles, 3): matrix, first row and first column of a tile of BLOCK_M x BLOCK_N, all of them; `triangle`: the
    same of BLOCK_N x BLOCK_N on and below the diagonal; `panels` (panels, 2): matrix and first row of BLOCK_N rows.
    The largest matrices come first.
    """

    matrices: Tensor
    tiles: Tensor
    triangle: Tensor
    panels: Tensor


def lay_out(shapes: Sequence[tuple[int, int]], block_n: int) -> tuple[list[Bank], int]:
    """Place banks (batch, n) one after another; also return the length of the workspace."""
    banks, offset = [], 0
    for batch, n in shapes:
        padded = -(-n // block_n) * block_n
        banks.append(Bank(batch, n, padded, offset))
        offset += batch * padded**2
    return banks, offset


def make_work(
    shapes: Sequence[tuple[int, int]],
    places: Sequence[int],
    block_n: int,
    block_m: int,
    device: torch.device,
    traced: bool = False,
) -> Work:
    """Tables for banks (batch, n) whose results begin at `places`; kept from call to call, but not while tracing."""
    key = (tuple(shapes), tuple(places), block_n, block_m)
    return _on_device(_tables(*key), device) if traced else Work(*_kept.get(key, device, lambda: _tables(*key)))


def _on_device(tables: Sequence[Table], device: torch.device) -> Work:
    """Made from lists: a trace on fake tensors can't copy arrays to a GPU."""
    return Work(*(torch.tensor(t.tolist(), dtype=DTYPES[t.dtype.itemsize], device=device) for t in tables))


def _tables(
    shapes: tuple[tuple[int, int], ...], places: tuple[int, ...], block_n: int, block_m: int
) -> tuple[Table, ...]:
    banks, _ = lay_out(shapes, block_n)
    matrices = [
        (bank.offset + i * bank.padded**2, bank.n, bank.padded, 0, 0, place + i)
        for bank, place in zip(banks, places, strict=True)
        for i in range(bank.batch)
    ]
    matrices.sort(key=lambda row: -row[1])
    table = np.array(matrices, dtype=np.int64).reshape(-1, 6)
    sizes = table[:, 2]
    for column, counts in ((3, sizes // block_n * (sizes // block_m)), (4, sizes // block_n)):
        table[:, column] = np.cumsum(counts) - counts
    whole = {int(size): _tiles_of(int(size), block_m, block_n, lower=False) for size in np.unique(sizes)}
    lower = {int(size): _tiles_of(int(size), block_n, block_n, lower=True) for size in np.unique(sizes)}
    panels = {int(size): np.arange(0, size, block_n)[:, None] for size in np.unique(sizes)}
    return table, *(_all_of(sizes, of_size) for of_size in (whole, lower, panels))


def _tiles_of(size: int, block_m: int, block_n: int, lower: bool) -> Table:
    """First rows and columns of the tiles of one matrix, `GROUP` rows of tiles at a time, column by column."""
    rows, columns = np.meshgrid(np.arange(size // block_m), np.arange(size // block_n), indexing="ij")
    order = np.lexsort((rows.ravel(), columns.ravel(), rows.ravel() // GROUP))
    tiles = np.stack([rows.ravel() * block_m, columns.ravel() * block_n], axis=1)[order]
    return tiles[tiles[:, 0] >= tiles[:, 1]] if lower else tiles


def _all_of(sizes: Table, of_size: dict[int, Table]) -> Table:
    """Work items of all matrices, each with its matrix in front."""
    parts = [np.insert(of_size[int(size)], 0, m, axis=1) for m, size in enumerate(sizes)]
    return np.concatenate(parts).astype(np.int32)
