"""`auto` means bfloat16 where the hardware multiplies it; a name means itself."""

import pytest
import torch

from moe.train.precision import resolve


@pytest.mark.parametrize(
    "precision, use_gpu, capabilities, want",
    [
        pytest.param("float32", True, {}, "float32", id="a-name-stays-on-a-gpu"),
        pytest.param("bfloat16", False, {}, "bfloat16", id="a-name-stays-on-a-cpu"),
        pytest.param("auto", True, {}, "bfloat16", id="gpu"),
        pytest.param("auto", False, {"avx512_bf16": True}, "bfloat16", id="cpu-with-avx512-bf16"),
        pytest.param("auto", False, {"amx_bf16": True}, "bfloat16", id="cpu-with-amx"),
        pytest.param("auto", False, {"avx2": True, "avx512_bf16": False}, "float32", id="cpu-without"),
    ],
)
def test_resolve(monkeypatch, precision, use_gpu, capabilities, want):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve(precision, use_gpu) == want
