"""The kernels of rotary positions, with and without the norm, by head size and number of heads."""

from collections.abc import Iterator

from kernels.aot.build import Build, simple
from kernels.triton_backend import rope

HEADS = ((32, 4, 128), (16, 2, 64), (8, 8, 96), (8, 1, 256))  # H, G, C
TYPES = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "q_partial_ptr": "*fp32", "k_partial_ptr": "*fp32", "eps": "fp32"}
OF_NORM = ("q_weight_ptr", "k_weight_ptr", "q_partial_ptr", "k_partial_ptr")


def builds(architecture: str) -> Iterator[Build]:
    for H, G, C in HEADS:
        constants, options = rope.launch(H, G, C)
        for kernel, inputs in (("rope_heads", ()), ("rope_heads_backward", ("q_ptr", "k_ptr"))):
            for label, absent in (("normed", ()), ("plain", (*OF_NORM, *inputs))):
                missing = {name: None for name in absent if name in getattr(rope, kernel).arg_names}
                yield simple(rope, kernel, f"rope bf16 {H}/{G} heads of {C} {label}", architecture, constants | missing,
                             options, pointer="*bf16", types=TYPES)
