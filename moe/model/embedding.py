"""The embedding: each token's row of a table, and a gradient whose sums are float32 and come in one order.

    x_TD = weight_VD[token_T];  dweight_VD[v] = sum of dx_TD[t] over the t of token v

torch's own gradient sums in the table's type on a CPU: in bfloat16 the row of a token that comes 600 times was off by
2 % (4,096 tokens of Zipf's law). On a GPU it may add with atomics where few different tokens come often (torch 2.11 and
later), so runs would not repeat. Here the sums are float32, rounded once to the table's type, and without atomics: in
the backward there is a gradient of [V, D] in float32 for a while, beside the one in the table's type.

T tokens, V vocabulary, D width; token int64, weight any floating type. First order only.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Embedding(nn.Embedding):
    """nn.Embedding with this gradient."""

    def forward(self, token_T: Tensor) -> Tensor:
        return _Lookup.apply(self.weight, token_T)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VD, token_T):
        ctx.save_for_backward(token_T)
        ctx.vocab_size = weight_VD.shape[0]
        return nn.functional.embedding(token_T, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_TD):
        token_T, = ctx.saved_tensors
        wide = torch.promote_types(dx_TD.dtype, torch.float32)
        with _without_atomics() if dx_TD.is_cuda else nullcontext():
            dweight_VD = torch.ops.aten.embedding_dense_backward(dx_TD.to(wide), token_T, ctx.vocab_size, -1, False)
        return dweight_VD.to(dx_TD.dtype), None  # weight, token


@contextmanager
def _without_atomics() -> Iterator[None]:
    """torch's kernel for GPUs asks the process whether it may use them. That for CPUs has none, and there the switch
    alone would import a compiler, for a second."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
