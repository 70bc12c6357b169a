import pytest
import torch

import kernels
from kernels.testing import expert_choice


def test_by_hand(implementation, device):
    """The example of the module's docstring."""
    got = kernels.dispatch(torch.tensor([[0, 2], [0, 1]], device=device), 3)
    assert got.offset.tolist() == [0, 2, 3, 4]
    assert got.token_N.tolist() == [0, 1, 1, 0]
    assert got.row_TK.tolist() == [[0, 3], [1, 2]]


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("T, K, E, load", [
    pytest.param(0, 2, 3, "even", id="no-tokens"),
    pytest.param(1, 1, 1, "even", id="smallest"),
    pytest.param(1, 3, 3, "even", id="every-expert"),
    pytest.param(50, 2, 7, "even", id="odd-counts"),
    pytest.param(50, 1, 7, "hot", id="one-hot-expert"),
    pytest.param(64, 2, 8, "holes", id="every-other-expert-empty"),
    pytest.param(200, 4, 64, "zipf", id="skew"),
    pytest.param(700, 2, 1000, "even", id="more-experts-than-rows-of-a-block"),
])
def test_tables_agree(T, K, E, load, integer, implementation, device):
    expert_TK = expert_choice(T, K, E, load).to(device, integer)
    offset, token_N, row_TK = kernels.dispatch(expert_TK, E)
    assert {offset.dtype, token_N.dtype, row_TK.dtype} == {torch.int32}
    counts = [(expert_TK == e).sum().item() for e in range(E)]
    assert offset.diff().tolist() == counts and offset[0] == 0
    assert sorted(row_TK.flatten().tolist()) == list(range(T * K))
    for t in range(T):
        for k in range(K):
            row, e = row_TK[t, k], expert_TK[t, k]
            assert token_N[row] == t and offset[e] <= row < offset[e + 1]
    for e in range(E):  # stable: rows of one expert in token order
        tokens = token_N[offset[e]:offset[e + 1]].tolist()
        assert tokens == sorted(tokens)


@pytest.mark.parametrize("expert, num_experts, message", [
    pytest.param(torch.tensor([0, 1]), 2, r"expert has shape \(2,\): want \(T, K\)", id="shape"),
    pytest.param(torch.zeros(2, 1), 2, "expert is float32: want int32 or int64", id="dtype"),
    pytest.param(torch.tensor([[0, 1], [1, 2]]), 2, r"expert\[1, 1\] is 2: want 0 to 1", id="too-large"),
    pytest.param(torch.tensor([[0, 1], [-1, 3]]), 2, r"expert\[1, 0\] is -1: want 0 to 1", id="first-is-named"),
    pytest.param(torch.zeros(2, 0).int(), 2, "K, the columns of expert, is 0: want at least 1", id="no-columns"),
    pytest.param(torch.tensor([[0]]), 0, "num_experts is 0: want at least 1", id="no-experts"),
])
def test_refuses(expert, num_experts, message):
    with pytest.raises(ValueError, match=message):
        kernels.dispatch(expert, num_experts)
