"""Packed triangles of symmetric matrices: there and back, of sizes that are mirrored as a whole and by blocks."""

import pytest
import torch

from triton_curv.packing import pack, packed_size, unpack


@pytest.mark.parametrize("n", [1, 2, 33, 64, 257, 640, 785])
def test_there_and_back(n: int) -> None:
    torch.manual_seed(0)
    half = torch.randn(2, n, n)
    matrices = half + half.mT
    packed = pack(matrices)
    assert packed.shape == (2, packed_size(n))
    assert torch.equal(unpack(packed, n), matrices)
    room = torch.full((2, n, n), torch.nan)
    assert unpack(packed, n, room) is room
    assert torch.equal(room, matrices)
    room[0, 0, 0] = torch.nan
    assert torch.equal(packed, pack(matrices)), "what is unpacked is a copy"
    assert torch.equal(pack(matrices.clone(), spoil=True), packed)
