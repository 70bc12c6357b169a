"""Every op of the model: its equation, its contract and its fast implementations.

One op has one name in four places: `kernels/combine.py` (the contract and the code),
`kernels/reference/` (the equation), `tests/kernels/test_combine.py` and the benchmark.
Which implementation runs is decided in `kernels/backend.py`. Imports torch and triton only.

Axis letters, everywhere in this folder:
    T tokens (flat: the documents of a batch one after another)   D model width   B documents
    H query heads   G key/value heads   C head size   R = C / 2
    S router slots  K experts per token   N = T * K routed rows, sorted by expert
    E stacked experts   F expert width   V vocabulary
"""

from kernels.attention import attention
from kernels.combine import combine
from kernels.decode import decode
from kernels.dispatch import dispatch
from kernels.documents import documents
from kernels.experts import experts
from kernels.linear_cross_entropy import linear_cross_entropy, linear_log_prob
from kernels.norm import add_rms_norm, rms_norm
from kernels.reference import (
    IGNORED,
    CrossEntropy,
    Dispatch,
    Documents,
    Gate,
    Llama3Scaling,
    RopeScaling,
    Route,
    YarnScaling,
)
from kernels.rope import rope, rope_table
from kernels.router import balance_loss, route

__all__ = [
    "IGNORED",
    "CrossEntropy",
    "Dispatch",
    "Documents",
    "Gate",
    "Llama3Scaling",
    "RopeScaling",
    "Route",
    "YarnScaling",
    "add_rms_norm",
    "attention",
    "balance_loss",
    "combine",
    "decode",
    "dispatch",
    "documents",
    "experts",
    "linear_cross_entropy",
    "linear_log_prob",
    "rms_norm",
    "rope",
    "rope_table",
    "route",
]
