import logging

import pytest
import torch

import kernels
from kernels import backend, reference
from kernels.testing import linear_cross_entropy_inputs


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend._choose.cache_clear()


def test_torch_is_the_default():
    assert backend.choose("cpu") == "torch"


def test_the_environment_forces_one(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert backend.choose("cpu") == "reference"


@pytest.mark.parametrize("name", ["fast", "TORCH", "triton2"])
def test_an_unknown_name_is_refused(name, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, name)
    with pytest.raises(ValueError, match=f"POLYCLINIC_BACKEND={name}: want one of .*torch.*reference"):
        backend.choose("cpu")


def test_the_choice_is_logged_once_with_its_reason(monkeypatch, caplog):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    with caplog.at_level(logging.INFO, logger="kernels.backend"):
        backend.choose("cpu")
        backend.choose("cpu")
    assert [r.getMessage() for r in caplog.records] == [
        "kernels on cpu: backend reference, because POLYCLINIC_BACKEND forces it"]


def test_ops_follow_the_switch(monkeypatch):
    """bfloat16 losses: the two backends differ in the last bits, so the switch can be seen."""
    inputs = linear_cross_entropy_inputs(9, 65, 33, torch.bfloat16, "cpu")
    fast = kernels.linear_cross_entropy(*inputs)
    monkeypatch.setenv(backend.VARIABLE, "reference")
    slow = kernels.linear_cross_entropy(*inputs)
    assert torch.equal(slow, reference.linear_cross_entropy(*inputs))
    assert not torch.equal(fast, slow)
