"""For all tests: one thread, because small shapes gain nothing from more and the cores are shared.

Without a GPU the Triton kernels are made for Triton's interpreter, which has to be said before Triton is imported.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True  # for this process alone: processes that tests start compile for a device
    del os.environ["TRITON_INTERPRET"]


def pytest_configure() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
