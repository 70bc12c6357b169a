"""Counting work: what a token costs, and what this device could do at best."""

import time

import torch

from moe.model import Decoder
from moe.model.mixture import MixtureFFN

PROBE_WIDTH, PROBE_REPEATS = 1024, 8
GPU_PROBE_WIDTH = 8192  # or launching it would take longer than computing it


def training_flops_per_token(model: Decoder) -> float:
    """6 per trained and 4 per frozen active parameter: a frozen one has no weight gradient (forward 2, dx 2, dW 2).

    An expert counts with the share of tokens it gets when balanced. Attention's own products are left out."""
    share = {}
    for module in model.modules():
        if isinstance(module, MixtureFFN):
            used = min(module.router.gate.top_k, module.router.num_present) / len(module.experts)
            share.update({id(p): used for p in module.experts.parameters()})
    if not model.config.tie_embeddings:
        share[id(model.embedding.weight)] = 0.0  # a row of it is looked up, and there is no product
    return sum((6 if p.requires_grad else 4) * _whole(p) * share.get(id(p), 1.0) for p in model.parameters())


def _whole(parameter: torch.nn.Parameter) -> int:
    """Its elements, also where they are spread over ranks (ZeRO 3)."""
    return getattr(parameter, "ds_numel", parameter.numel())


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a plain square product on this device with this process's threads: the denominator of MFU.

    The best of a few short runs: long enough to be warm, short enough not to delay the first step."""
    width = GPU_PROBE_WIDTH if device.type == "cuda" else PROBE_WIDTH
    a = torch.randn(width, width, device=device).to(dtype)
    best = float("inf")
    for _ in range(PROBE_REPEATS):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * width**3 / best
