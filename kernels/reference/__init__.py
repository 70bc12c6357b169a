"""Every op as its plain equation: the oracle the fast code is held against.

Slow and obvious. Gradients come from autograd, so they check every hand-written backward
independently. Works in any float type; sums and softmaxes are in float32, or in float64 for
float64 inputs. Same names and signatures as the public ops, without their checks.
"""

from kernels.reference.attention import attention, decode, visible
from kernels.reference.experts import Dispatch, combine, dispatch, experts
from kernels.reference.linear_cross_entropy import IGNORED, CrossEntropy, linear_cross_entropy, linear_log_prob
from kernels.reference.norm import add_rms_norm, rms_norm
from kernels.reference.packing import Documents
from kernels.reference.precision import at_least_float32
from kernels.reference.rope import Llama3Scaling, RopeScaling, YarnScaling, rope, rope_table
from kernels.reference.router import SCORES, SMALLEST_SUM, Gate, Route, best, route, within_best_groups

__all__ = [
    "IGNORED",
    "SCORES",
    "SMALLEST_SUM",
    "CrossEntropy",
    "Dispatch",
    "Documents",
    "Gate",
    "Llama3Scaling",
    "RopeScaling",
    "Route",
    "YarnScaling",
    "add_rms_norm",
    "at_least_float32",
    "attention",
    "best",
    "combine",
    "decode",
    "dispatch",
    "experts",
    "linear_cross_entropy",
    "linear_log_prob",
    "rms_norm",
    "rope",
    "rope_table",
    "route",
    "visible",
    "within_best_groups",
]
