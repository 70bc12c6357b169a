"""Experts by MegaBlocks' product: its gradients and its refusals, with the product itself in plain torch where the
packages or the GPU are missing; with the real one where they are."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kernels
from kernels import backend, megablocks_backend, reference
from kernels.testing import assert_as_exact_as, experts_inputs, outputs_and_gradients

NAMES = "out dx dw_gate_up dw_down dweight"
REAL = not megablocks_backend.obstacle()
DEVICE = "cuda" if REAL else "cpu"
asked = []  # of the stand-in: the numbers of rows of each call


def product(a, b, rows, trans_a=False, trans_b=False):
    """What the package says of its own: expert by expert, bfloat16 in and out."""
    asked.append(rows.tolist())
    assert rows.device.type == "cpu" and rows.dtype == torch.int64 and a.dtype == b.dtype == torch.bfloat16
    parts = a.split(rows.tolist())
    if trans_a:  # experts without rows are left as they were
        return torch.stack([left.T @ right if len(left) else torch.full((a.shape[1], b.shape[1]), float("nan")).to(a)
                            for left, right in zip(parts, b.split(rows.tolist()), strict=True)])
    return torch.cat([part @ (matrix.T if trans_b else matrix) for part, matrix in zip(parts, b, strict=True)])


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, backend.EXPERTS_ONLY)
    megablocks_backend.require.cache_clear()
    yield
    megablocks_backend.require.cache_clear()


@pytest.fixture
def present(monkeypatch):
    """The packages, or their stand-ins."""
    asked.clear()
    if not REAL:
        monkeypatch.setitem(sys.modules, "megablocks", ModuleType("megablocks"))
        monkeypatch.setitem(sys.modules, "grouped_gemm", SimpleNamespace(backend=SimpleNamespace(gmm=product)))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("T, K, D, F, E, load", [
    pytest.param(5, 2, 32, 48, 7, "even", id="empty-experts"),
    pytest.param(150, 3, 64, 96, 12, "zipf", id="skew"),
    pytest.param(64, 2, 24, 16, 8, "holes", id="every-other-expert-empty"),
    pytest.param(0, 2, 16, 24, 3, "even", id="no-tokens"),
])  # fmt: skip
def test_matches_the_reference(T, K, D, F, E, load, present):
    inputs = experts_inputs(T, K, D, F, E, torch.bfloat16, DEVICE, load)
    assert_as_exact_as(reference.experts, kernels.experts, reference.experts, inputs, NAMES, terms=max(T, D, F))
    assert REAL or not T or asked


def test_what_the_sum_is_added_to_and_no_gradient_at_all(present):
    *inputs, weight = experts_inputs(40, 2, 16, 24, 4, torch.bfloat16, DEVICE)
    base = torch.randn(40, 16, device=DEVICE).bfloat16()
    with torch.no_grad():
        got = kernels.experts(*inputs, weight, base).double()
        want = reference.experts(*(t.double() if isinstance(t, torch.Tensor) else t for t in inputs),
                                 weight.double(), base.double())
    assert (got - want).abs().max() <= 2**-7 * want.abs().max()


def test_equal_bits_every_time(present):
    inputs = experts_inputs(100, 2, 32, 48, 6, torch.bfloat16, DEVICE)
    first, second = (outputs_and_gradients(kernels.experts, inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_dense_networks_and_all_else_go_on_as_without_it(present, monkeypatch):
    x_TD, w_gate_up, w_down, *_ = experts_inputs(20, 1, 16, 24, 1, torch.float32, DEVICE)
    got = kernels.experts(x_TD, w_gate_up, w_down)
    assert REAL or backend.choose(x_TD) == "torch"
    monkeypatch.delenv(backend.VARIABLE)
    assert torch.equal(got, kernels.experts(x_TD, w_gate_up, w_down)) and not asked


def test_is_logged_once(present, caplog):
    with caplog.at_level(logging.INFO, logger="kernels"), torch.no_grad():
        for _ in range(2):
            kernels.experts(*experts_inputs(20, 2, 16, 24, 4, torch.bfloat16, DEVICE))
    assert [r.getMessage() for r in caplog.records if "megablocks" in r.getMessage()] == [
        "experts in bfloat16: backend megablocks, because POLYCLINIC_BACKEND forces it"]


def refused(dtype=torch.bfloat16):
    with pytest.raises(ValueError) as error:
        kernels.experts(*experts_inputs(20, 2, 16, 24, 4, dtype, DEVICE))
    return str(error.value)


def test_another_dtype_is_refused(present):
    assert refused(torch.float32) == "POLYCLINIC_BACKEND=megablocks: its products take bfloat16, not float32"


def test_without_a_gpu_it_is_refused(present, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused() == "POLYCLINIC_BACKEND=megablocks: there is no CUDA device, which its products need"


@pytest.mark.parametrize("absent", megablocks_backend.PACKAGES)
def test_a_package_that_cannot_be_imported_is_named(absent, present, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)
    assert f"the package {absent} cannot be imported (ModuleNotFoundError" in refused()
