"""Which float type a run computes in."""

import torch


def resolve(precision: str, use_gpu: bool) -> str:
    """`auto` becomes bfloat16 where the hardware multiplies it natively, else float32; other names stay."""
    if precision != "auto":
        return precision
    if use_gpu:
        return "bfloat16"
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"
