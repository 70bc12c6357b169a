"""A matrix product on a CPU: the fastest library, and bits that depend on values and shapes, not on addresses.

    float32, x86            oneDNN: 2.1 times MKL's rate on AMD EPYC with AVX-512 (2 threads, 400 against 187 GFLOP/s,
                            torch 2.13), where MKL takes its AVX2 code. It compiles and keeps code for every number of
                            rows, 3 MB each: callers with changing numbers of rows round them up (`row_multiple`).
    float16, bfloat16       torch.mm, which is oneDNN too; its code for another number of rows is small.
    float64, other machines torch.mm.

Measured (MKL 2024.2, AVX-512): its float32 and float64 products round differently when an operand or the result does
not begin at a multiple of 16 bytes; oneDNN's do not. In a stack of experts of odd size, or in a file mapped into
memory, that would let the experts before this one decide its last bits, so such operands are copied first.
"""

import platform

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes
ROWS = 64  # a number of rows that changes from call to call is rounded up to a multiple of this in float32
# The op behind compiled linear layers; there is no public name for a float32 product by oneDNN.
ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def row_multiple(dtype: torch.dtype) -> int:
    """What a number of rows that changes from call to call is to be rounded up to a multiple of."""
    return ROWS if dtype == torch.float32 else 16


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, into `out` where given."""
    if ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu" and min(*a.shape, *b.shape) > 0:
        result = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return result if out is None else out.copy_(result)
    a, b = aligned(a), aligned(b)
    if out is None:
        return torch.mm(a, b)
    if out.data_ptr() % ALIGNMENT == 0:
        return torch.mm(a, b, out=out)
    return out.copy_(torch.mm(a, b))


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it at an address that is a multiple of ALIGNMENT."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
