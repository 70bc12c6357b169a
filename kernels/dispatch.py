"""Dispatch: the routed rows in the order of their experts, and the tables to get there and back.

    expert_TK = [[0, 2], [0, 1]]  ->  offset [0, 2, 3, 4], token [0, 1, 1, 0], row [[0, 3], [1, 2]]

Shapes  expert [T, K] in; offset [E + 1], token [N], row [T, K] out, N = T * K.
Dtypes  expert int32 or int64; tables int32.
Needs   0 <= expert < num_experts: checked on a CPU, and on a GPU only with POLYCLINIC_DEBUG=1, because it
        waits for the device; fewer than 2**31 rows.
Grads   None: integers.
Errors  ValueError for a wrong shape or dtype; where it is checked, for the first expert out of range.
Bits    No atomics: rows of one expert are in the order of (token, k).
Cost    torch: a stable sort of N integers. triton: three launches over N * E marks.
Source  The permutation step of MegaBlocks, arXiv:2211.15841 section 5.
"""

from torch import Tensor

from kernels import backend, checks, reference
from kernels.reference import Dispatch


def dispatch(expert_TK: Tensor, num_experts: int) -> Dispatch:
    """Return Dispatch(offset, token_N, row_TK); see the module docstring for the contract."""
    checks.shape("expert", expert_TK, "TK", None, None)
    checks.dtype("expert", expert_TK, *checks.INTEGERS)
    checks.at_least("K, the columns of expert,", expert_TK.shape[1], 1)
    checks.at_least("num_experts", num_experts, 1)
    if expert_TK.numel() > 0 and (expert_TK.device.type == "cpu" or backend.debugging()):
        least, most = (int(v) for v in expert_TK.aminmax())
        if least < 0 or most >= num_experts:
            wrong = ((expert_TK < 0) | (expert_TK >= num_experts)).nonzero()[0].tolist()
            raise ValueError(f"expert[{wrong[0]}, {wrong[1]}] is {int(expert_TK[tuple(wrong)])}: "
                             f"want 0 to {num_experts - 1}")
    if backend.choose(expert_TK) == "triton":
        from kernels.triton_backend import dispatch as implementation
        return implementation.dispatch(expert_TK, num_experts)
    return reference.dispatch(expert_TK, num_experts)
