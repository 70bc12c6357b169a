import pytest
import torch

from kernels import backend

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    """These tests hold the fast code against the reference, whatever the shell says."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small shapes gain nothing from threads, and other tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
