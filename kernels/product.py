"""A matrix product whose bits depend on the operands' values and shapes, not on where they lie.

Measured (torch 2.13, MKL 2024.2, AVX-512): float32 and float64 products round differently when an
operand or the result does not begin at a multiple of 16 bytes; bfloat16 products do not. In a stack of
experts of odd size, or in a file mapped into memory, that would let the experts before this one
decide its last bits.

Cost    Nothing where tensors begin at a multiple of 16 bytes, as they do when D and F are multiples
        of 8; otherwise a copy of the one that does not.
"""

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, into `out` where given."""
    a, b = aligned(a), aligned(b)
    if out is None:
        return torch.mm(a, b)
    if out.data_ptr() % ALIGNMENT == 0:
        return torch.mm(a, b, out=out)
    return out.copy_(torch.mm(a, b))


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it at an address that is a multiple of ALIGNMENT."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
