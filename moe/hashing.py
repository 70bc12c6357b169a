"""SHA-256 of tensors and of plain values: what H0, manifests and certificates are made of."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor


def tensor_hash(tensor: Tensor) -> str:
    """Of a tensor's dtype, shape and bits, wherever it lies."""
    contiguous = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # strides as the shape says
    digest = hashlib.sha256(f"{contiguous.dtype}{list(contiguous.shape)}".encode())
    digest.update(contiguous.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: tensor_hash(tensors[name]) for name in sorted(tensors)}


def value_hash(value: Any) -> str:
    """Of plain values (what JSON can say), independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
