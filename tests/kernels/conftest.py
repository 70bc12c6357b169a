import pytest
import torch

from kernels import backend
from kernels.triton_backend.launch import INTERPRETED

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    """These tests hold the fast code against the reference, whatever the shell says."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@pytest.fixture(params=["torch", "triton"])
def implementation(request, device, nothing_forced, monkeypatch) -> str:
    """Force each backend in turn: one contract, so one test. On a CPU Triton's kernels run in its interpreter."""
    if request.param == "triton" and device == "cpu" and not INTERPRETED:
        pytest.skip("Triton's kernels were made for the GPU that is here")
    monkeypatch.setenv(backend.VARIABLE, request.param)
    return request.param


@pytest.fixture(params=["float32", "half"])
def dtype(request, device, implementation) -> torch.dtype:
    """Half is bfloat16; float16 where the interpreter runs, whose casts to bfloat16 truncate instead of rounding."""
    if request.param == "float32":
        return torch.float32
    return torch.float16 if implementation == "triton" and device == "cpu" else torch.bfloat16


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small shapes gain nothing from threads, and other tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
