"""Which implementation of the ops runs: one switch, decided once per kind of device and dtype.

    triton      our kernels (kernels/triton_backend). GPUs; under TRITON_INTERPRET=1 CPU tensors, slowly, for tests.
    torch       fast PyTorch: sorted rows, one product per expert. CPUs; runs on a GPU too.
    reference   the plain equations of kernels/reference: the oracle, slow.
    megablocks  a mixture's experts by MegaBlocks' product (kernels/megablocks_backend); all else as without it.

POLYCLINIC_BACKEND forces one for the whole process. The choice is logged once with its reason. POLYCLINIC_DEBUG=1 has
the ops check on a GPU, too, what they can only check by waiting for it.
There is no silent fallback: a name that does not exist, or cannot run on the device, is a ValueError.
"""

import functools
import logging
import os

import torch
from torch import Tensor

BACKENDS = ("triton", "torch", "reference")
EXPERTS_ONLY = "megablocks"
VARIABLE, DEBUG = "POLYCLINIC_BACKEND", "POLYCLINIC_DEBUG"

log = logging.getLogger(__name__)


def choose(x: Tensor) -> str:
    """The backend for an op whose first input is x: one of BACKENDS."""
    forced = os.environ.get(VARIABLE, "")
    return _choose(x.device.type, x.dtype, "" if forced == EXPERTS_ONLY else forced)


def choose_experts(x: Tensor) -> str:
    """The backend for a mixture's experts: one of BACKENDS, or EXPERTS_ONLY. Raises ValueError where that cannot be
    used."""
    if os.environ.get(VARIABLE) != EXPERTS_ONLY:
        return choose(x)
    from kernels import megablocks_backend

    megablocks_backend.require(x.dtype)
    return EXPERTS_ONLY


@functools.cache
def _choose(device_type: str, dtype: torch.dtype, forced: str) -> str:
    # Cached, so that each combination is decided and logged once.
    if forced and forced not in BACKENDS:
        raise ValueError(f"{VARIABLE}={forced}: want one of {', '.join(BACKENDS)}, {EXPERTS_ONLY}")
    if forced:
        name, reason = forced, f"{VARIABLE} forces it"
    elif device_type != "cuda":
        name, reason = "torch", "the fastest that exists there"
    elif dtype == torch.float64:
        name, reason = "torch", "the Triton kernels sum in float32"
    else:
        name, reason = "triton", "the fastest that exists there"
    if name == "triton":
        if dtype == torch.float64:
            raise ValueError(f"{VARIABLE}=triton: the Triton kernels take float16, bfloat16 and float32, not float64")
        if device_type != "cuda" and not _interpreted():
            raise ValueError(f"{VARIABLE}=triton: on a {device_type} Triton's kernels run through its interpreter "
                             "only; want TRITON_INTERPRET=1 set before the process starts")
    short = str(dtype).removeprefix("torch.")
    log.info("kernels on %s in %s: backend %s, because %s", device_type, short, name, reason)
    return name


def force(name: str) -> None:
    """Have this process use this backend from now on; "auto" leaves the choice to the environment and the device."""
    if name != "auto":
        os.environ[VARIABLE] = name


def debugging() -> bool:
    return os.environ.get(DEBUG, "") == "1"


def _interpreted() -> bool:
    try:
        from kernels.triton_backend.launch import INTERPRETED
    except ModuleNotFoundError as error:
        raise ValueError(f"{VARIABLE}=triton: {error}") from error
    return INTERPRETED
