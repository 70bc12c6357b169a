"""Which implementation of the ops runs: one switch, decided once per kind of device.

    torch       fast PyTorch: sorted rows, one product per expert. CPUs; runs on a GPU too.
    reference   the plain equations of kernels/reference.py: the oracle, slow.

POLYCLINIC_BACKEND forces one for the whole process. The choice is logged once with its reason.
There is no silent fallback: a name that does not exist, or cannot run on the device, is a ValueError.
"""

import functools
import logging
import os

BACKENDS = ("torch", "reference")
VARIABLE = "POLYCLINIC_BACKEND"

log = logging.getLogger(__name__)


def choose(device_type: str) -> str:
    """The backend for tensors on `device_type` ("cpu", "cuda"): one of BACKENDS."""
    return _choose(device_type, os.environ.get(VARIABLE, ""))


@functools.cache
def _choose(device_type: str, forced: str) -> str:
    # Cached, so that each (device, forced name) is decided and logged once.
    if forced and forced not in BACKENDS:
        raise ValueError(f"{VARIABLE}={forced}: want one of {', '.join(BACKENDS)}")
    name, reason = (forced, f"{VARIABLE} forces it") if forced else ("torch", "the fastest that exists here")
    log.info("kernels on %s: backend %s, because %s", device_type, name, reason)
    return name
