"""SHA-256 of tensors: what H0, packs and certificates are made of; and seeds out of values."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tensor_hash(tensor: Tensor) -> str:
    """Of a tensor's dtype, shape and bits, wherever it lies."""
    digest = digest_of(tensor.dtype, tensor.shape)
    digest.update(tensor_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def digest_of(dtype: torch.dtype, shape: Sequence[int]) -> Any:
    """What becomes a tensor's hash when its bytes have been put into it, at once or in parts."""
    return hashlib.sha256(f"{dtype}{list(shape)}".encode())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Of a tensor on the CPU; not copied where it lies in order."""
    flat = tensor.contiguous().view(-1)
    if flat.stride() != (1,):  # of one element: any stride is in order
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def tensor_hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: tensor_hash(tensors[name]) for name in sorted(tensors)}


def seed_of(*values: int | str) -> int:
    """The seed of a stream of random numbers that belongs to these values alone."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=7).digest(), "little")
