"""Attention's kernels: every pinned tile, with the features that change their code."""

from collections.abc import Iterator

import torch

from kernels.aot.build import MATRIX, Build
from kernels.triton_backend import attention, attention_backward, attention_forward

MODULES = {"forward": attention_forward, "queries": attention_backward, "keys": attention_backward}
SIZES = ((64, 64), (128, 128), (192, 128), (256, 256))  # C, U
PLAIN = dict(causal=True, window=False, softcap=False, sink=False, dropout=False, group=4)
VARIANTS = {
    "causal": PLAIN,
    "full": PLAIN | dict(causal=False),
    "window+sink": PLAIN | dict(window=True, sink=True),
    "window+softcap+sink": PLAIN | dict(window=True, softcap=True, sink=True),
    "dropout": PLAIN | dict(dropout=True),
    "everything": PLAIN | dict(causal=False, window=True, softcap=True, sink=True, dropout=True),
}
EVERYWHERE = ("causal", "window+softcap+sink", "everything")  # the rest at 128 only: their tiles are the same
SCALARS = {"T": "i32", "H": "i32", "scale": "fp32", "factor": "fp32", "inner": "fp32", "window": "i32", "seed": "i64",
           "threshold": "u32", "gain": "fp32", "tile_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32",
           "sink_ptr": "*fp32"}


def builds(architecture: str) -> Iterator[Build]:
    for kernel in MODULES:
        for C, U in SIZES:
            for label in VARIANTS if C == 128 else EVERYWHERE:
                yield from _builds(architecture, kernel, C, U, label, VARIANTS[label])
        yield from _builds(architecture, kernel, 80, 80, "group of 3", PLAIN | dict(group=3))
        yield from _builds(architecture, kernel, 33, 33, "odd", PLAIN, odd=True)
        yield from _builds(architecture, kernel, 64, 64, "causal", PLAIN, scalar="fp32")


def _builds(architecture: str, kernel: str, C: int, U: int, label: str, features: dict, scalar: str = "bf16",
            odd: bool = False) -> Iterator[Build]:
    """One, or two where dk and dv have launches of their own."""
    dtype = torch.bfloat16 if scalar == "bf16" else torch.float32
    blocks, options = attention.choose(kernel, architecture, dtype, C, U, features["softcap"], features["dropout"])
    group, padded = features["group"], blocks["BLOCK_C"] + blocks["BLOCK_U"]
    constants = blocks | dict(C=C, U=U, GROUP=group, CAUSAL=features["causal"], DROPOUT=features["dropout"],
                              EXACT=False)
    constants |= {name: None for name, feature in (("window", "window"), ("inner", "softcap"), ("sink_ptr", "sink"))
                  if not features[feature]}
    types = dict(SCALARS)
    for name, width in (("k_bulk", "BLOCK_C"), ("v_bulk", "BLOCK_U"), ("q_bulk", "BLOCK_C"), ("dout_bulk", "BLOCK_U")):
        of_rows = name in ("q_bulk", "dout_bulk")
        rows = [blocks["BLOCK_M"] // group, group] if of_rows else [blocks["BLOCK_N"]]
        pointers = odd or scalar == "fp32" or architecture not in attention.BULK
        if pointers or of_rows and not attention.of_whole_tokens(blocks, group):
            constants[name] = None
        else:
            types[name] = f"tensordesc<{scalar}[{','.join(map(str, [1, *rows, blocks[width]]))}]>"
    size = f"{C}" if C == U else f"{C}/{U}"
    tile = "x".join(str(blocks[f"BLOCK_{axis}"]) for axis in ("M", "N", "EDGE"))
    module, name = MODULES[kernel], f"attention_{kernel}"
    arguments = getattr(module, name).arg_names
    for dk, dv in attention.key_launches("dk", "dv", padded) if kernel == "keys" else [("", "")]:
        absent = {f"{pointer}_ptr": None for pointer, given in (("dk", dk), ("dv", dv)) if given is None}
        fixed = {argument: value for argument, value in (constants | absent).items() if argument in arguments}
        free = {argument: types.get(argument, f"*{scalar}") for argument in arguments if argument not in fixed}
        of = f" {dk or dv}" if absent else ""
        text = f"{scalar} {size} {tile} {options['num_warps']}w {options['num_stages']}s {label}{of}"
        yield Build(module.__name__.split(".")[-1], name, text, architecture, free, fixed, options, odd,
                    matrix=MATRIX[architecture] if scalar == "bf16" else "",
                    tma=any(argument.endswith("_bulk") for argument in free))
