import pytest
import torch

import kernels


def test_by_hand(device):
    documents = kernels.documents([0, 3, 4, 6], device)
    assert documents.boundaries == (0, 3, 4, 6)
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.position_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert documents.position_T.dtype == torch.int64
    assert {documents.cu_seqlens.device.type, documents.position_T.device.type} == {device}


def test_no_tokens():
    documents = kernels.documents([0])
    assert documents.boundaries == (0,)
    assert documents.position_T.shape == (0,)


@pytest.mark.parametrize("boundaries, message", [
    pytest.param([], r"boundaries are \[\]: want them to start with 0", id="empty"),
    pytest.param([1, 3], r"boundaries are \[1, 3\]: want them to start with 0", id="does-not-start-at-0"),
    pytest.param([0, 3, 3, 5, 4], r"document 1 has boundaries 3:3: want at least one token", id="empty-document"),
    pytest.param([0, 3, 5, 4, 2], r"document 2 has boundaries 5:4", id="first-offence-is-named"),
])
def test_refuses(boundaries, message):
    with pytest.raises(ValueError, match=message):
        kernels.documents(boundaries)
