"""For all tests: one thread, because small shapes gain nothing from more and the cores are shared."""

import os

import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
