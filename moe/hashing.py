"""SHA-256 of tensors: what H0, packs and certificates are made of; and seeds out of values."""

import hashlib

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


def seed_of(*values: int | str) -> int:
    """The seed of a stream of random numbers that belongs to these values alone."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=7).digest(), "little")
