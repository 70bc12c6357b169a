"""The router's kernels, in every mode."""

from collections.abc import Iterator

import torch

from kernels.aot.build import MATRIX, Build, simple
from kernels.reference import Gate
from kernels.triton_backend import router, router_kernels


def builds(architecture: str) -> Iterator[Build]:
    gates = [(16, Gate(2)), (64, Gate(8, "softmax")), (128, Gate(8, "softmax", renormalise=True)),
             (256, Gate(8, "sigmoid", renormalise=True, scale=2.5, num_groups=8, top_groups=4))]
    for S, gate in gates:
        launches = {"choose": router.choose_launch(S, gate, torch.bfloat16, architecture),
                    "choose_backward": router.choose_backward_launch(S, gate),
                    "input_gradient": router.input_gradient_launch(S, torch.bfloat16, architecture),
                    "table_gradient": router.table_gradient_launch(S, torch.bfloat16, architecture)}
        for kernel, (constants, options) in launches.items():
            names = getattr(router_kernels, kernel).arg_names
            types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names if name not in constants}
            known = {"x_ptr": "*bf16", "dx_ptr": "*bf16", "present_ptr": "*i1", "slot_ptr": "*i32", "count_ptr": "*i32",
                     "scale": "fp32"}
            types |= {name: kind for name, kind in known.items() if name in types}
            label = f"bf16 S {S} K {gate.top_k} {gate.score}"
            low = constants["BLOCK_S" if kernel == "table_gradient" else "BLOCK_T"] < 64  # too low for wgmma, tcgen05
            matrix = "mma.sync" if low and architecture.startswith("sm") else MATRIX[architecture]
            yield Build("router_kernels", kernel, label, architecture, types, constants, options,
                        matrix=matrix if "PRODUCT" in constants else "")
    types = {"count_of_ptr": "*i32", "count_ptr": "*i32"}
    yield simple(router_kernels, "statistics", "", architecture, router.STATISTICS, {}, pointer="*fp32", types=types)
