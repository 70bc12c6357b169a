"""The benchmarks of attention, decoding, norms, rotations and the loss: each from its command line to its JSON lines,
at a shape that takes no time."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import kernels
from benchmarks import (
    attention_peers,
    bench_attention,
    bench_decode,
    bench_linear_cross_entropy,
    bench_norm,
    bench_rope,
    harness,
)
from kernels import reference

MISSING = "is not installed"


def timed(rows):
    return [row for row in rows if "ms" in row]


def run(module, lines, *arguments):
    """Rows of a run, and its reasons by provider."""
    assert module.main(["--device", "cpu", "--seconds", "0", "--out", str(lines.path), *arguments]) == 0
    rows = lines.read()
    return rows, {row["provider"]: row["reason"] for row in rows if "reason" in row}


# ----------------------------------------------------------------------------------------- by hand

@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 3), (False, 3), (True, 1), (True, 99)])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_pairs_are_those_that_are_visible(length, causal, window):
    seen = reference.visible(kernels.documents([0, length]), causal, window)
    assert bench_attention.pairs(length, causal, window) == seen.sum()


def test_flops_of_attention_by_hand():
    """Two documents of 3 tokens, 6 pairs each, 4 heads: 2 (C + U) flops a pair forward."""
    found = bench_attention.flops("attention: causal", B=2, L=3, H=4, G=2, C=5, U=7)
    assert found == {"forward": 48 * 24, "backward": 48 * 58, "both": 48 * 82}
    assert bench_attention.flops("attention: window 1", B=2, L=3, H=4, G=2, C=5, U=7)["forward"] == 24 * 24
    same = bench_attention.flops("attention: full", B=1, L=8, H=1, G=1, C=64, U=64)
    assert same["forward"] == 4 * 64 * 64 and same["backward"] == 2.5 * same["forward"]


def test_packed_documents_fill_the_batch_with_a_long_tail():
    lengths = bench_attention.lengths("packed", 8, 2048)
    assert sum(lengths) == 8 * 2048 and max(lengths) <= 2048 and lengths == bench_attention.lengths("packed", 8, 2048)
    many = sorted(bench_attention.lengths("packed", 512, 2048))
    assert 270 < many[len(many) // 2] < 330 and many[-1] == 2048 and many[0] < 40
    assert bench_attention.lengths("causal", 3, 5) == [5, 5, 5]


def test_bytes_by_hand():
    assert bench_norm.bytes_moved("norm", T=10, D=8, itemsize=2) == {"forward": 320, "backward": 480, "both": 800}
    assert bench_norm.bytes_moved("add", T=10, D=8, itemsize=2) == {"forward": 640, "backward": 640, "both": 1280}
    heads, table = 10 * 3 * 8 * 2, 10 * 8 * 4
    assert bench_rope.bytes_moved("plain", T=10, H=2, G=1, C=8, itemsize=2) == {
        "forward": 2 * heads + table, "backward": 2 * heads + table, "both": 4 * heads + 2 * table}
    assert bench_rope.bytes_moved("normed", T=10, H=2, G=1, C=8, itemsize=2)["backward"] == 3 * heads + table
    assert bench_decode.bytes_moved(B=3, L=10, H=4, G=2, C=8, itemsize=2) == {"forward": 2 * 3 * 10 * 16 * 2 + 2 * 192}


def test_flops_of_the_loss_by_hand():
    assert bench_linear_cross_entropy.flops(T=2, D=3, V=5) == {"forward": 60, "backward": 120, "both": 180}


# ----------------------------------------------------------------------------------------- runs

@pytest.mark.parametrize("mode, without", [
    ("causal", set()), ("full", set()), ("packed", set()), ("window", set()),
    ("softcap", {"torch sdpa flash", "torch sdpa math", "transformers sdpa"}),
    ("sink", {"torch sdpa flash", "torch sdpa math", "transformers sdpa"}),
])
def test_attention(mode, without, quick, lines, monkeypatch):
    monkeypatch.setitem(bench_attention.WINDOW, "cpu", 5)
    rows, reasons = run(bench_attention, lines, "--shapes", "2,16,4,2,8,8", "--modes", mode, "--dtypes", "float32",
                        "--passes", "both")
    assert set(reasons) == without | {"torch flex"} and "no backward on a CPU" in reasons["torch flex"]
    assert all(mode in reasons[name] for name in without)
    every = {"kernels (torch)", "torch sdpa flash", "torch sdpa math", "transformers sdpa", "transformers eager"}
    assert {row["provider"] for row in timed(rows)} == every - without
    assert all(row["distance"] < 1e-5 and row["percent_of_p"] > 0 for row in timed(rows))
    (against,) = [row for row in rows if "against" in row]
    assert against["provider"] == "kernels (torch)" and against["against"] in every


@pytest.mark.filterwarnings("ignore:Flash attention")  # why torch's kernel is not used
def test_attention_of_two_head_sizes(quick, lines):
    rows, _ = run(bench_attention, lines, "--shapes", "2,16,2,2,12,8", "--modes", "causal", "--passes", "forward")
    assert {row["dtype"] for row in timed(rows)} == {"bfloat16", "float32"}
    assert {"kernels (torch)", "torch sdpa math", "transformers eager"} <= {row["provider"] for row in timed(rows)}


def test_the_oracle_by_pieces_is_the_oracle():
    point = bench_attention.point_of(dict(B=2, L=9, H=4, G=2, C=8, U=6), torch.float32, "cpu", "sink")
    i = bench_attention.Inputs(point)
    step = i.step(lambda: reference.attention(i.q_THC, i.k_TGC, i.v_TGU, i.documents, sink_H=i.sink_H))
    want = step.named(step.both())
    assert set(want) == {"out", "dq", "dk", "dv", "dsink"}
    pieces = bench_attention.plain(i)
    assert harness.distance(pieces.named(pieces.both()), want, 1e-4) < 1e-6


@pytest.mark.parametrize("mode", bench_norm.MODES)
def test_norm(mode, quick, lines):
    rows, reasons = run(bench_norm, lines, "--shapes", "24,16", "--modes", mode)
    assert list(reasons) == ["liger-kernel"] and MISSING in reasons["liger-kernel"]
    assert len(timed(rows)) == 2 * 3 * 3 and all(row["percent_of_copy"] > 0 for row in timed(rows))
    assert {row["provider"] for row in timed(rows)} == {"kernels (torch)", "torch", "transformers"}


@pytest.mark.parametrize("mode", bench_rope.MODES)
def test_rope(mode, quick, lines):
    rows, reasons = run(bench_rope, lines, "--shapes", "24,4,2,16", "--modes", mode)
    assert list(reasons) == ["liger-kernel"] and MISSING in reasons["liger-kernel"]
    assert {row["provider"] for row in timed(rows)} == {"kernels (torch)", "torch", "transformers"}
    assert all(row["percent_of_copy"] > 0 for row in timed(rows)) and any("against" in row for row in rows)


def test_linear_cross_entropy(quick, lines):
    rows, reasons = run(bench_linear_cross_entropy, lines, "--shapes", "24,16,40")
    assert set(reasons) == {"liger-kernel", "cut-cross-entropy"} and all(MISSING in r for r in reasons.values())
    assert {(row["provider"], row["pass"]) for row in timed(rows)} == {
        (name, "both") for name in ("kernels (torch)", "torch", "torch chunked", "transformers")}
    assert all(row["peak_mib"] > 0 for row in timed(rows))


@pytest.mark.parametrize("mode", bench_decode.MODES)
def test_decode(mode, quick, lines):
    rows, reasons = run(bench_decode, lines, "--shapes", "3,70,4,2,16", "--modes", mode)
    assert reasons == {}
    assert {(row["provider"], row["pass"]) for row in timed(rows)} == {
        (name, "forward") for name in ("kernels (torch)", "torch sdpa", "torch sdpa, heads packed")}


# ------------------------------------------------------------------------- peers that are not installed where tests run

def stand_ins():
    """The public names that the adapters use, with the meaning their own sources give them, in plain torch."""
    def norm(x, weight, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def add_norm(x, residual, weight, *more):
        return norm(x + residual, weight, *more), x + residual

    def rotate(q, k, cos, sin):
        def turned(x):
            a, b = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]
        return turned(q), turned(k)

    space = SimpleNamespace
    return {
        "liger_kernel.ops.rms_norm": space(LigerRMSNormFunction=space(apply=norm)),
        "liger_kernel.ops.fused_add_rms_norm": space(LigerFusedAddRMSNormFunction=space(apply=add_norm)),
        "liger_kernel.transformers.rope": space(liger_rotary_pos_emb=rotate),
        "liger_kernel.transformers": space(LigerFusedLinearCrossEntropyLoss=lambda: (
            lambda w, h, label: F.cross_entropy(h @ w.T, label))),
        "cut_cross_entropy": space(linear_cross_entropy=lambda h, w, label: F.cross_entropy(h @ w.T, label)),
    }


@pytest.mark.parametrize("module, shape, mode, names", [
    (bench_norm, dict(T=6, D=8), ["norm"], ["liger-kernel"]),
    (bench_norm, dict(T=6, D=8), ["add"], ["liger-kernel"]),
    (bench_rope, dict(T=6, H=4, G=2, C=8), ["plain"], ["liger-kernel"]),
    (bench_rope, dict(T=6, H=4, G=2, C=8), ["normed"], ["liger-kernel"]),
    (bench_linear_cross_entropy, dict(T=16, D=8, V=20), [], ["liger-kernel", "cut-cross-entropy"]),
])
def test_adapters_of_peers(module, shape, mode, names, monkeypatch):
    for name in stand_ins():
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), SimpleNamespace())
    for name, stand_in in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    inputs = module.Inputs(module.point_of(shape, torch.float32, "cpu", *mode))
    plain = module.plain if hasattr(module, "plain") else lambda i: module.ours(i, reference)
    want = plain(inputs)
    want = want.named(want.both())
    for name in names:
        (peer,) = [p for p in module.providers(inputs) if p.name == name]
        step = peer.make()
        assert harness.distance(step.named(step.both()), want, 1e-4) < 1e-5, name


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, window_size=(-1, -1),
           softcap=0.0, learnable_sink=None):
    """flash_attn_varlen_func: a query sees window_size[0] keys before it, and itself."""
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    out = reference.attention(q, k, v, kernels.documents(cu_seqlens_q.tolist()), causal=causal,
                              window=None if window_size[0] < 0 else window_size[0] + 1, softcap=softcap or None,
                              sink_H=learnable_sink)
    return out, None


@pytest.mark.parametrize("mode", bench_attention.MODES)
def test_adapters_of_flash_attn(mode, monkeypatch):
    monkeypatch.setitem(bench_attention.WINDOW, "cpu", 5)
    point = bench_attention.point_of(dict(B=2, L=16, H=4, G=2, C=8, U=8), torch.float32, "cpu", mode)
    inputs = bench_attention.Inputs(point)
    want = bench_attention.plain(inputs)
    want = want.named(want.both())
    for name, module in attention_peers.FLASH_ATTN.items():
        with pytest.raises(harness.NotAvailable, match=MISSING):
            attention_peers.flash_attn(inputs, module)
        with monkeypatch.context() as patch:
            for parent in ("flash_attn", module):
                patch.setitem(sys.modules, parent, SimpleNamespace(flash_attn_varlen_func=varlen, __path__=[]))
            if mode == "sink" and module != "flash_attn.cute":
                with pytest.raises(harness.NotAvailable, match="no sink"):
                    attention_peers.flash_attn(inputs, module)
                continue
            step = inputs.step(attention_peers.flash_attn(inputs, module))
            assert harness.distance(step.named(step.both()), want, 1e-4) < 1e-5, name


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("mode", bench_attention.MODES)
def test_adapter_of_flex(mode, monkeypatch):
    """Not compiled, and forward only, which is all there is on a CPU."""
    monkeypatch.setitem(bench_attention.WINDOW, "cpu", 5)
    point = bench_attention.point_of(dict(B=2, L=16, H=4, G=2, C=8, U=8), torch.float32, "cpu", mode)
    inputs = bench_attention.Inputs(point)
    want = bench_attention.plain(inputs).forward()[0]
    for leaf in inputs.leaves:
        leaf.requires_grad_(False)
    got = attention_peers.flex_by(flex_attention, inputs)()
    assert harness.relative_distance(got, want.detach()) < 1e-5
