"""In which float type an equation is computed."""

import torch
from torch import Tensor


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
