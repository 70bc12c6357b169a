"""How an op refuses what it cannot use: a ValueError that names the thing, its value and what was wanted.

No check here reads a tensor's values, so none waits for a GPU.
"""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def shape(name: str, tensor: Tensor, axes: str, *sizes: int | None) -> None:
    """`axes` are the letters ("THC"), one size each; None accepts any size."""
    fits = tensor.dim() == len(sizes) and all(
        want is None or got == want for got, want in zip(tensor.shape, sizes, strict=True))
    if not fits:
        wanted = ", ".join(a if s is None else f"{a}={s}" for a, s in zip(axes, sizes, strict=True))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: want ({wanted})")


def dtype(name: str, tensor: Tensor, *wanted: torch.dtype) -> None:
    if tensor.dtype not in wanted:
        names = " or ".join(str(w).removeprefix("torch.") for w in wanted)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}: want {names}")


def floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        dtype(name, tensor, *FLOATS)


def same_dtype(**tensors: Tensor) -> None:
    """All have the dtype of the first, which is a floating one."""
    (first, reference), *others = tensors.items()
    dtype(first, reference, *FLOATS)
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}: "
                             f"want {str(reference.dtype).removeprefix('torch.')}, as {first} is")


def same_device(**tensors: Tensor) -> None:
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(f"{name} is on {tensor.device}: want {reference.device}, where {first} is")


def at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}: want at least {least}")
