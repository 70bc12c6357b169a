import logging

import pytest
import torch

import kernels
from kernels import backend, reference
from kernels.testing import linear_cross_entropy_inputs

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend._choose.cache_clear()


def test_torch_is_the_default():
    assert backend.choose(CPU) == "torch"


def test_the_environment_forces_one(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert backend.choose(CPU) == "reference"


@pytest.mark.parametrize("name", ["fast", "TORCH", "triton2"])
def test_an_unknown_name_is_refused(name, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, name)
    with pytest.raises(ValueError, match=f"POLYCLINIC_BACKEND={name}: want one of .*torch.*reference"):
        backend.choose(CPU)


def test_the_choice_is_logged_once_with_its_reason(monkeypatch, caplog):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    with caplog.at_level(logging.INFO, logger="kernels.backend"):
        backend.choose(CPU)
        backend.choose(CPU)
    assert [r.getMessage() for r in caplog.records] == [
        "kernels on cpu in float32: backend reference, because POLYCLINIC_BACKEND forces it"]


def test_triton_is_for_gpus(monkeypatch):
    class OnGPU:
        device, dtype = torch.device("cuda"), torch.bfloat16

    assert backend.choose(OnGPU) == "triton"
    OnGPU.dtype = torch.float64
    assert backend.choose(OnGPU) == "torch"
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(ValueError, match="take float16, bfloat16 and float32, not float64"):
        backend.choose(OnGPU)


def test_triton_on_a_cpu_wants_the_interpreter(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="on a cpu Triton's kernels run .* want TRITON_INTERPRET=1"):
        backend.choose(CPU)
    backend._choose.cache_clear()
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    assert backend.choose(CPU) == "triton"


def test_ops_follow_the_switch(monkeypatch):
    """bfloat16 losses: the two backends differ in the last bits, so the switch can be seen."""
    inputs = linear_cross_entropy_inputs(9, 65, 33, torch.bfloat16, "cpu")
    fast = kernels.linear_log_prob(*inputs)
    monkeypatch.setenv(backend.VARIABLE, "reference")
    slow = kernels.linear_log_prob(*inputs)
    assert torch.equal(slow, reference.linear_log_prob(*inputs))
    assert not torch.equal(fast, slow)


def test_a_config_forces_one_for_the_process(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    backend.force("auto")
    assert backend.choose(CPU) == "reference"
    backend.force("torch")
    assert backend.choose(CPU) == "torch"
