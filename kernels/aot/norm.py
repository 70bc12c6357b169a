"""The kernels of the RMS norm: with and without a residual, by width."""

from collections.abc import Iterator

from kernels.aot.build import Build, simple
from kernels.triton_backend import norm

WIDTHS = (128, 2048, 4096, 7168, 8192, 16_384)
ROWS = {"r_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32"}


def builds(architecture: str) -> Iterator[Build]:
    for D in WIDTHS:
        constants, options = norm.launch(D)
        for kernel in ("norm_rows", "norm_rows_backward"):
            for label, absent in (("add", ()), ("alone", ("residual_ptr", "sum_ptr", "dsum_ptr"))):
                if (kernel, D, label) == ("norm_rows_backward", 16_384, "add"):
                    continue  # spills 4 bytes of a thread on sm_90, 12 on sm_100
                missing = {name: None for name in absent if name in getattr(norm, kernel).arg_names}
                yield simple(norm, kernel, f"norm bf16 D {D} {label}", architecture, constants | missing, options,
                             pointer="*bf16", types=ROWS)
