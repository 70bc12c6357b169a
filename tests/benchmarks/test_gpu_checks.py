"""The checks of a device, small and on a CPU: that they pass, and that they find what is wrong."""

import json

import pytest
import torch

import kernels
from benchmarks import bench_attention, checks_attention, checks_block, gpu_checks
from kernels import reference


def test_checks_pass_on_a_cpu(tmp_path):
    out = tmp_path / "checks.jsonl"
    assert gpu_checks.main(["--device", "cpu", "--small", "--out", str(out)]) == 0
    names = [json.loads(line)["check"] for line in out.read_text().splitlines()]
    assert names == list(gpu_checks.checks("cpu", small=True)) and len(names) == len(set(names)) > 15
    assert names == [name for group in gpu_checks.GROUPS for name in gpu_checks.checks("cpu", True, group)]


def wrong_experts(x_TD, w_gate_up, w_down, dispatch=None, weight_TK=None, base_TD=None, experts=kernels.experts):
    """Adds up one wrong row: that of the first token."""
    out = experts(x_TD, w_gate_up, w_down, dispatch, weight_TK, base_TD)
    return torch.cat([1.01 * out[:1], out[1:]])


def other_bits(calls, x_TD, w_gate_up, w_down, *rest, experts=kernels.experts):
    """Differs from call to call in one bit."""
    calls.append(x_TD)
    out = experts(x_TD, w_gate_up, w_down, *rest)
    return out + torch.full_like(out, len(calls) % 2 * 1e-2)


def test_checks_find_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "experts", wrong_experts)
    arguments = ["--device", "cpu", "--small", "--group", "experts"]
    assert gpu_checks.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith("FAIL") for line in lines)
    assert gpu_checks.main([*arguments, "--from", str(len(lines))]) == 0


def test_checks_of_bits_find_what_differs(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "experts", lambda *given: other_bits(calls, *given))
    for name, check in gpu_checks.checks("cpu", small=True, group="layer").items():
        assert not gpu_checks.run(name, check)["ok"], name


BLOCK_OPS = {"attention": ["attention"], "features": ["attention"], "decode": ["decode"],
             "norms": ["rms_norm", "add_rms_norm", "rope"], "loss": ["linear_cross_entropy", "linear_log_prob"]}


def changed(op, change):
    """An op whose first floating output is changed."""
    def wrong(*given, **options):
        out = op(*given, **options)
        if not isinstance(out, tuple):
            return change(out)
        rest = [change(o) if i == 0 else o for i, o in enumerate(out)]
        return type(out)(*rest) if hasattr(out, "_fields") else tuple(rest)
    return wrong


@pytest.mark.parametrize("group", BLOCK_OPS)
def test_checks_of_a_block_find_what_is_wrong(group, monkeypatch):
    for name in BLOCK_OPS[group]:
        monkeypatch.setattr(kernels, name, changed(getattr(kernels, name), lambda out: out * 1.01))
    exact = {name: check for name, check in gpu_checks.checks("cpu", True, group).items() if "as exact as" in name}
    assert exact
    for name, check in exact.items():
        assert not gpu_checks.run(name, check)["ok"], name


@pytest.mark.parametrize("group", ["features", "norms", "loss"])
def test_checks_of_a_blocks_bits_find_what_differs(group, monkeypatch):
    calls = []

    def other(out):
        calls.append(out)
        return out + torch.full_like(out, len(calls) % 2 * 1e-2)

    name = {"features": "attention", "norms": "add_rms_norm", "loss": "linear_cross_entropy"}[group]
    monkeypatch.setattr(kernels, name, changed(getattr(kernels, name), other))
    for name, check in gpu_checks.checks("cpu", True, group).items():
        if "repeat" in name or "nobody cleared" in name:
            assert not gpu_checks.run(name, check)["ok"], name


def test_a_document_that_knows_of_another_is_found(monkeypatch):
    attention = kernels.attention

    def leaking(q, k, v, documents, **options):
        return attention(q, k, v, kernels.documents([0, len(q)]), **options)

    monkeypatch.setattr(kernels, "attention", leaking)
    check = gpu_checks.checks("cpu", True, "features")["a document is alone"]
    assert "knows of another document" in gpu_checks.run("", check)["detail"]


def test_a_sequence_that_is_not_alone_is_found(monkeypatch):
    monkeypatch.setattr(checks_attention, "promised", lambda x: True)
    monkeypatch.setattr(kernels, "decode", changed(kernels.decode, lambda out: out + 1e-3 * len(out)))
    check = gpu_checks.checks("cpu", True, "decode")["a sequence is alone"]
    assert "depends on the batch" in gpu_checks.run("", check)["detail"]


HALF, HEADS = torch.float16, (4, 2, 16, 16)
LARGE = {
    "attention": lambda: checks_attention.attention_long_offsets("cpu", 3, 8, HEADS, torch.float32),
    "long document": lambda: checks_attention.long_document("cpu", 40, HEADS, HALF, rows=4),
    "decode": lambda: checks_attention.decode_long_offsets("cpu", 3, 20, 4, 2, 16, torch.float32),
    "block": lambda: checks_block.block_long_offsets("cpu", 30, 4, 1, 16, HALF, alone=7),
    "loss": lambda: checks_block.long_loss("cpu", 40, 16, 50, HALF, last=5),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_checks_at_a_small_size(name, monkeypatch):
    """With ops that have one document or sequence at a time: torch's do not promise the same bits in every batch."""
    monkeypatch.setattr(kernels, "attention", bench_attention.by_document)
    monkeypatch.setattr(kernels, "decode", reference.decode)
    assert LARGE[name]()


@pytest.mark.parametrize("module, check, arguments, names", [
    (checks_attention, "attention_replays", ([9, 5], HEADS, HALF), 5),
    (checks_attention, "decode_replays", (3, 50, 4, 2, 16, 16, 16, HALF), 1),
    (checks_block, "block_replays", (12, 4, 1, 16, HALF), 8),
    (checks_block, "loss_replays", (12, 16, 50, HALF), 5),
])
def test_what_a_graph_replays_changes_with_its_inputs(module, check, arguments, names, monkeypatch):
    def replays(run, change, given):
        first = [t.clone() for t in run()]
        with torch.no_grad():
            change(1)
        assert len(first) == len(given) == names
        assert not torch.equal(first[0], run()[0]) and all(t.isfinite().all() for t in first)
        return "changed"

    monkeypatch.setattr(module, "replays", replays)
    assert getattr(module, check)("cpu", *arguments) == "changed"
