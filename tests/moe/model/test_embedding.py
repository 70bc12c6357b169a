"""The embedding's gradient: sums in float32 for every type, rounded once."""

import pytest
import torch

from moe.model.embedding import Embedding


def common_tokens(T, V):
    """Of Zipf's law: the first is a seventh of all."""
    return torch.multinomial(1 / torch.arange(1.0, V + 1), T, replacement=True,
                             generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype, most", [
    pytest.param(torch.float32, 1e-5, id="float32"),  # 600 terms of either sign
    pytest.param(torch.bfloat16, 2**-8, id="bfloat16"),  # one rounding
])  # fmt: skip
def test_a_row_that_is_used_often_has_its_whole_gradient(dtype, most):
    token_T = common_tokens(4096, 512)
    dx_TD = (torch.randn(4096, 16, generator=torch.Generator().manual_seed(1)) * 1e-3 + 1e-3).to(dtype)
    embedding = Embedding(512, 16).to(dtype)
    x_TD = embedding(token_T)
    assert torch.equal(x_TD, embedding.weight[token_T])
    x_TD.backward(dx_TD)
    want_VD = torch.zeros(512, 16, dtype=torch.float64).index_add_(0, token_T, dx_TD.double())
    got_VD = embedding.weight.grad
    assert got_VD.dtype == dtype and not torch.are_deterministic_algorithms_enabled()
    torch.testing.assert_close(got_VD.double(), want_VD, rtol=most, atol=1e-6)


def test_a_cpu_is_not_asked_for_determinism(monkeypatch):
    """It has it; the question would import a compiler, for a second in every rank."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: pytest.fail("asked"))
    Embedding(5, 3)(torch.tensor([1, 1, 4])).sum().backward()


def test_strided_and_unused():
    embedding = Embedding(5, 3)
    embedding(torch.tensor([1, 1, 4])).sum().backward()  # a gradient of stride 0
    assert embedding.weight.grad.tolist() == [[0.0] * 3, [2.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3]
    embedding.weight.grad = None
    embedding(torch.tensor([], dtype=torch.int64)).sum().backward()
    assert not embedding.weight.grad.any()
