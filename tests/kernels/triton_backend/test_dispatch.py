"""What the kernels do in pieces has to fit together; the contract is held in ../test_dispatch.py."""

import pytest
import torch

from kernels.reference import dispatch as plain
from kernels.testing import expert_choice
from kernels.triton_backend import dispatch as in_triton

LOADS = pytest.mark.parametrize("load", ["even", "zipf", "hot", "holes"])


@LOADS
def test_more_blocks_and_tiles_than_are_written_at_a_time(load, device, monkeypatch):
    monkeypatch.setattr(in_triton, "MARKS", 128)  # blocks of 16 rows
    monkeypatch.setattr(in_triton, "CHUNK", 2)
    monkeypatch.setattr(in_triton, "TILES_CHUNK", 2)
    expert_TK = expert_choice(90, 2, 8, load).to(device)
    got, want = in_triton.dispatch(expert_TK, 8), plain(expert_TK, 8)
    assert all(map(torch.equal, got, want))
    expert, first, count = in_triton.tiles(got.offset, 180, 16)
    offset = want.offset.tolist()
    tiles = [(e, row) for e in range(8) for row in range(offset[e], offset[e + 1], 16)]
    assert count.item() == len(tiles) <= len(expert)
    assert list(zip(expert.tolist(), first.tolist(), strict=True))[:len(tiles)] == tiles


@LOADS
def test_longest_first(load, device):
    offset = plain(expert_choice(90, 2, 8, load).to(device), 8).offset
    count = offset.diff().tolist()
    assert in_triton.longest_first(offset).tolist() == sorted(range(8), key=lambda e: -count[e])
