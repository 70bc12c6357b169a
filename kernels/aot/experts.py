"""The kernels of the experts: grouped products in every pinned configuration, dispatch, combine."""

from collections.abc import Iterator
from os import environ
from pathlib import Path

from kernels.aot.build import MATRIX, Build, simple
from kernels.triton_backend import combine, dispatch, grouped_gemm
from kernels.triton_backend.configurations import FOLDER, VARIABLE, Configuration, load


def builds(architecture: str) -> Iterator[Build]:
    yield from _of_products(architecture)
    yield from _of_dispatch(architecture)
    yield from _of_combine(architecture)


def _of_products(architecture: str) -> Iterator[Build]:
    forced = environ.get(VARIABLE)
    for entry in load(Path(forced) if forced else FOLDER / f"{architecture}.json"):
        for left in (True, False) if entry.product == "weight_gradient" else (False,):
            every = entry.max_rows is None and entry.kind == "half"  # float32 is for tests
            for variant in ("", "odd", "dense") if every else ("",):
                yield _grouped(architecture, entry, left, variant)
            if entry.product == "up":
                yield _grouped(architecture, entry, left, "inference")


def _grouped(architecture: str, entry: Configuration, left: bool, variant: str) -> Build:
    """left: which side of a weight gradient is gathered. Variant: "odd", "dense" (no dispatch, no weights),
    "inference" (h is not kept) or ""."""
    odd = variant == "odd"
    scalar = "bf16" if entry.kind == "half" else "fp32"
    tma = entry.tma and scalar == "bf16" and not odd
    m, n, k = entry.block_m, entry.block_n, entry.block_k
    constants = {**entry.constants(), "EXACT": False}
    pointer = f"*{scalar}"

    def operand(*block: int) -> str:
        return f"tensordesc<{scalar}[{','.join(map(str, block))}]>" if tma else pointer

    types = {"token_ptr": "*i32", "offset_ptr": "*i32", "tile_expert_ptr": "*i32", "tile_first_ptr": "*i32",
             "num_tiles_ptr": "*i32", "order_ptr": "*i32", "weight_ptr": "*fp32", "partial_ptr": "*fp32"}
    if entry.product == "weight_gradient":
        kernel, constants = "weight_gradient", constants | {"LEFT_GATHERED": left, "RIGHT_GATHERED": not left}
    else:
        kernel = entry.product.removesuffix("_transposed")
        constants |= {"TMA": tma, "FLATTEN": entry.flatten}
        transposed = entry.product == "rows_transposed"
        if kernel == "rows":
            constants["TRANSPOSED"] = transposed
        types["a"] = operand(m, k)
        types["w"] = operand(1, 2, n, k) if kernel == "up" else operand(1, n, k) if transposed else operand(1, k, n)
    arguments = getattr(grouped_gemm, kernel).arg_names
    if variant == "dense":
        constants |= {name: None for name in ("token_ptr", "weight_ptr", "partial_ptr") if name in arguments}
    if variant == "inference":
        constants["h_ptr"] = None
    types = {name: types.get(name, pointer if name.endswith("_ptr") else "i32")
             for name in arguments if name not in constants}
    label = f"{entry.product if kernel == 'rows' else ''} {scalar} {m}x{n}x{k} {entry.num_warps}w {entry.num_stages}s"
    label += " flat" * entry.flatten + (" left" if left else " right") * (kernel == "weight_gradient")
    return Build("grouped_gemm", kernel, f"{label} {variant}".strip(), architecture, types, constants,
                 entry.options(gathered=variant != "dense"), odd,
                 matrix=MATRIX[architecture] if scalar == "bf16" else "", tma=tma)


def _of_dispatch(architecture: str) -> Iterator[Build]:
    width = 128  # experts; the most marks a program has
    sizes = {"WIDTH": width, "BLOCK": dispatch.block_of(width)}
    for kernel, constants in (
            ("_count", sizes), ("_scan", {"CHUNK": dispatch.CHUNK}), ("_scatter", {**sizes, "K": 8}),
            ("_tiles", {"WIDTH": width, "CHUNK": dispatch.TILES_CHUNK}), ("_longest_first", {"WIDTH": width})):
        yield simple(dispatch, kernel, f"E {width}", architecture, constants,
                      {"num_warps": 8} if "BLOCK" in constants else {}, pointer="*i32")


def _of_combine(architecture: str) -> Iterator[Build]:
    types = {"weight_ptr": "*fp32", "row_ptr": "*i32", "dweight_ptr": "*fp32"}
    absent = {"weight_ptr": None, "base_ptr": None}  # as the sum of experts' gradients has it
    for kernel, label, without in (("_forward", "bf16 K 8", {}), ("_forward", "bf16 K 8 plain", absent),
                                   ("_backward", "bf16 K 8", {})):
        constants = {"K": 8, "BLOCK_D": combine.MAX_BLOCK_D, **without}
        yield simple(combine, kernel, label, architecture, constants, combine.options(combine.MAX_BLOCK_D),
                      pointer="*bf16", types=types)
