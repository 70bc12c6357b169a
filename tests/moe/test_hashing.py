"""Hashes tell tensors apart by dtype, shape and bits, and plain values by content, not by the order of keys."""

import pytest
import torch

from moe.hashing import tensor_hash, tensor_hashes
from moe.manifest import value_hash


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(torch.zeros(3, 2), id="shape"),
        pytest.param(torch.zeros(2, 3, dtype=torch.int32), id="dtype-of-the-same-size"),
        pytest.param(torch.zeros(2, 3, dtype=torch.bfloat16), id="dtype"),
        pytest.param(-torch.zeros(2, 3), id="the-sign-of-zero"),
        pytest.param(torch.zeros(2, 3).index_fill(1, torch.tensor([2]), 1e-45), id="one-bit"),
    ],
)
def test_what_differs_has_another_hash(other):
    assert tensor_hash(other) != tensor_hash(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4)], ids=str)
def test_where_a_tensor_lies_does_not_matter(dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    assert tensor_hash(tensor) == tensor_hash(tensor.clone())
    strided = tensor.new_empty(*shape, 2)
    strided[..., 0] = tensor
    assert tensor_hash(strided[..., 0]) == tensor_hash(tensor)
    if tensor.is_floating_point():
        assert tensor_hash(tensor.requires_grad_()) == tensor_hash(strided[..., 0])


def test_the_hash_does_not_change_between_versions():
    """It is written into packs and manifests that outlive this code."""
    assert tensor_hash(torch.tensor([1.0, 2.0])).startswith("551b6c7aa109")
    assert value_hash({"b": [1, None], "a": "x"}) == value_hash({"a": "x", "b": [1, None]})
    assert value_hash({"a": 1}).startswith("015abd7f5cc5")
    assert list(tensor_hashes({"b": torch.zeros(1), "a": torch.zeros(1)})) == ["a", "b"]
