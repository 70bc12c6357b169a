import pytest
import torch

from kernels.product import ALIGNMENT, product


def placed(tensor, offset):
    """A copy that begins `offset` elements after an aligned address."""
    buffer = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    assert buffer.data_ptr() % ALIGNMENT == 0
    return buffer[offset:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 100])
def test_the_place_in_memory_changes_no_bit(n, dtype):
    """The three products of a linear layer, with every operand and result at every alignment."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n, 33), (47, 33), (n, 47)))
    for a, b, turn_a, turn_b in ((x, w, False, True), (dy, w, False, False), (dy, x, True, False)):
        def product_of(a, b, *out, turn_a=turn_a, turn_b=turn_b):
            return product(a.T if turn_a else a, b.T if turn_b else b, *out)

        want = product_of(a, b)
        for offset in (1, 2, 3, 5, 8):
            assert torch.equal(product_of(placed(a, offset), b), want)
            assert torch.equal(product_of(a, placed(b, offset)), want)
            out = placed(torch.zeros_like(want), offset)
            assert product_of(a, b, out) is out
            assert torch.equal(out, want)
