"""Decoding's kernels: every pinned step, with the features that change their code."""

from collections.abc import Iterator

import torch

from kernels.aot.build import MATRIX, Build, simple
from kernels.triton_backend import decode

SIZES = ((64, 64), (128, 128), (256, 256), (192, 128))  # C, U


def builds(architecture: str) -> Iterator[Build]:
    for C, U in SIZES:
        yield _split(architecture, C, U, 4, "pages")
        yield _split(architecture, C, U, 4, "no pages", pages=False)
    yield _split(architecture, 128, 128, 4, "window+softcap", window=True, softcap=True)
    yield _split(architecture, 128, 128, 40, "group of 40")
    yield _split(architecture, 80, 80, 1, "odd", odd=True)
    yield _split(architecture, 128, 128, 4, "float32", scalar="fp32")
    constants, options = decode.merge_launch(128)
    types = {"length_ptr": "*i32", "out_ptr": "*bf16"}
    for label, without in (("sink+window", {}), ("plain", {"sink_ptr": None, "window": None})):
        yield simple(decode, "merge", f"bf16 128 {label}", architecture, constants | without, options, pointer="*fp32",
                     types=types)


def _split(architecture: str, C: int, U: int, group: int, label: str, pages: bool = True, window: bool = False,
           softcap: bool = False, odd: bool = False, scalar: str = "bf16") -> Build:
    constants, options = decode.split_launch(group, C, U, torch.bfloat16 if scalar == "bf16" else torch.float32)
    for name, used in (("page_ptr", pages), ("window", window), ("inner", softcap)):
        if not used:
            constants[name] = None
    types = {name: f"*{scalar}" if name.endswith("_ptr") else "i32" for name in decode.split.arg_names}
    types |= dict(length_ptr="*i32", page_ptr="*i32", factor="fp32", inner="fp32")
    types |= dict.fromkeys(("acc_ptr", "top_ptr", "total_ptr"), "*fp32")
    types = {name: kind for name, kind in types.items() if name not in constants}
    low = constants["BLOCK_H"] < 64  # too low for wgmma, tcgen05
    matrix = "mma.sync" if low and architecture.startswith("sm") else MATRIX[architecture]
    size = f"{C}" if C == U else f"{C}/{U}"
    step = f"{constants['BLOCK_H']}x{constants['BLOCK_N']} {options['num_warps']}w {options['num_stages']}s"
    return Build("decode", "split", f"{scalar} {size} {step} {label}", architecture, types, constants, options, odd,
                 matrix=matrix if scalar == "bf16" else "")
