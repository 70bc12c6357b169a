"""The kernels of linear + cross-entropy."""

from collections.abc import Iterator

import torch

from kernels.aot.build import MATRIX, Build, simple
from kernels.triton_backend import linear_cross_entropy, linear_cross_entropy_kernels

MODULE = "linear_cross_entropy_kernels"


def builds(architecture: str) -> Iterator[Build]:
    for scalar, odd in (("bf16", False), ("bf16", True), ("fp32", False)):
        yield _partial_sums(architecture, scalar, odd)
        yield _row_gradient(architecture, scalar, odd)
    constants, options = linear_cross_entropy.MERGE
    yield simple(linear_cross_entropy_kernels, "merge", "", architecture, constants | {"IGNORED": -100}, options,
                 pointer="*fp32", types={"label_ptr": "*i64"})


def _partial_sums(architecture: str, scalar: str, odd: bool) -> Build:
    tile = linear_cross_entropy.choose(architecture, torch.bfloat16 if scalar == "bf16" else torch.float32)
    tma = tile.tma and not odd
    constants = tile.constants() | {"TMA": tma, "EXACT": False}
    types = {"label_ptr": "*i64", "most_ptr": "*fp32", "total_ptr": "*fp32", "chosen_ptr": "*fp32", "T": "i32",
             "D": "i32", "V": "i32"}
    for name, block in (("h", tile.block_m), ("w", tile.block_n)):
        types[name] = f"tensordesc<{scalar}[{block},{tile.block_k}]>" if tma else f"*{scalar}"
    label = f"{scalar} {tile.block_m}x{tile.block_n}x{tile.block_k} {tile.num_warps}w {tile.num_stages}s"
    return Build(MODULE, "partial_sums", label + " flat" * tile.flatten + " odd" * odd, architecture, types, constants,
                 tile.options(), odd, matrix=MATRIX[architecture] if scalar == "bf16" else "", tma=tma)


def _row_gradient(architecture: str, scalar: str, odd: bool) -> Build:
    constants, options = linear_cross_entropy.ROW
    types = {"z_ptr": "*fp32", "label_ptr": "*i64", "weight_ptr": "*fp32", "dz_ptr": f"*{scalar}",
             "log_prob_ptr": "*fp32", "logsumexp_ptr": "*fp32", "z_weight": "fp32", "V": "i32"}
    return Build(MODULE, "row_gradient", scalar + " odd" * odd, architecture, types, constants | {"IGNORED": -100},
                 options, odd)
