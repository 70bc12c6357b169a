"""Each benchmark from its command line to its JSON lines, at a shape that takes no time."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import against, bench_experts, bench_layer, bench_router, harness
from kernels.testing import expert_choice

PEERS = {"liger-kernel", "scattermoe", "sonic-moe", "megablocks"}  # not installed where tests run


def timed(rows):
    return [row for row in rows if "ms" in row]


def test_flops_by_hand():
    """One token, one expert, D 2, F 3: gate, up and down are products of 2 x 3, two flops a cell."""
    assert bench_experts.flops(T=1, D=2, F=3, E=4, K=1) == {"forward": 36, "backward": 72, "both": 108}
    assert bench_layer.flops(T=1, D=2, F=3, E=4, K=1)["both"] == 108 + 6 * 2 * 4
    assert bench_router.flops(T=5, D=2, S=4, K=1) == {"forward": 80, "backward": 160, "both": 240}


def test_bytes_of_the_router_by_hand():
    moved = bench_router.bytes_moved(T=10, D=8, S=4, K=2, itemsize=2)
    x, table, logits, chosen = 160, 128, 160, 160
    assert moved["forward"] == x + table + logits + chosen
    assert moved["backward"] == 2 * (x + table) + logits + chosen + 80
    assert moved["both"] == moved["forward"] + moved["backward"]


def test_empty_leaves_every_fifth_expert_without_tokens():
    used = torch.bincount(expert_choice(500, 2, 12, "empty").flatten(), minlength=12) > 0
    assert used.tolist() == [e % 5 != 4 for e in range(12)]


def test_slots_of_a_router_with_groups_come_from_its_top_groups():
    gate = bench_router.gate_of("sigmoid groups", 8)
    slot_TK = bench_router.slots(100, 32, gate)
    assert all(len(set(row)) == 8 and len({slot // 4 for slot in row}) == 4 for row in slot_TK.tolist())


def test_routed_inputs_are_routed_as_asked():
    slot_TK = expert_choice(50, 3, 24, "zipf")
    for dtype in (torch.bfloat16, torch.float32):
        x_TD, table_SD = bench_router.routed_inputs(slot_TK, 64, 24, dtype, "cpu")
        logits_TS = x_TD.float() @ table_SD.float().T
        chosen = torch.zeros(50, 24, dtype=torch.bool).scatter(1, slot_TK.long(), True)
        assert logits_TS[chosen].min() > 0.95 and logits_TS[~chosen].max() < 0.05


@pytest.mark.parametrize("load", bench_experts.LOADS)
def test_experts(load, quick, lines, capsys):
    assert bench_experts.main(["--device", "cpu", "--shapes", "24,16,8,6,2", "--seconds", "0", "--loads", load,
                               "--dtypes", "float32", "--passes", "forward", "both", "--out", str(lines.path)]) == 0
    rows = lines.read()
    assert {row["provider"]: row["reason"] for row in rows if "reason" in row} == {
        name: rows[i]["reason"] for i, name in enumerate(["liger-kernel", "scattermoe", "sonic-moe", "megablocks"])}
    assert all("not installed" in row["reason"] for row in rows if row["provider"] in PEERS)
    assert {(row["provider"], row["pass"]) for row in timed(rows)} == {
        (name, which) for which in ("forward", "both")
        for name in ("kernels (torch)", "torch grouped_mm", "transformers eager", "transformers grouped_mm")}
    assert all(row["load"] == load and row["shape"] == dict(T=24, D=16, F=8, E=6, K=2) for row in rows)
    assert "kernels (torch)" in capsys.readouterr().out


def test_layer(quick, lines, capsys):
    assert bench_layer.main(["--device", "cpu", "--shapes", "24,16,8,4,2", "--seconds", "0", "--passes", "both",
                             "--out", str(lines.path)]) == 0
    rows = lines.read()
    assert [row for row in rows if "reason" in row] == []
    assert len(timed(rows)) == 2 * 5 and {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    against = [row for row in rows if "against" in row]
    assert len(against) == 2 and all(row["provider"] == "kernels (torch)" for row in against)
    for row in against:
        peers = [p for p in timed(rows) if p["provider"] == row["against"] and p["dtype"] == row["dtype"]]
        ours = [p for p in timed(rows) if p["provider"] == row["provider"] and p["dtype"] == row["dtype"]]
        assert row["speedup"] == peers[0]["ms"] / ours[0]["ms"]
        assert row["memory_ratio"] == ours[0]["peak_mib"] / peers[0]["peak_mib"]
    assert "times as fast" in capsys.readouterr().out


def test_points_at_the_beginning_can_be_left_out(monkeypatch):
    seen = []
    monkeypatch.setattr(harness, "run", lambda points, build, settings: seen.append(points) or [])
    for more in ([], ["--skip", "3"]):
        assert bench_router.main(["--device", "cpu", *more]) == 0
    assert seen[1] == seen[0][3:] and len(seen[0]) > 3


def test_ratios_are_against_the_fastest_peer():
    def row(provider, ms, peak, which="both"):
        return {"op": "layer", "shape": {}, "dtype": "float32", "load": "even", "pass": which, "provider": provider,
                "percent_of_p": 50.0, "ms": ms, "peak_mib": peak, "void": False}

    rows = [row("kernels (torch)", 2.0, 30.0), row("transformers a", 5.0, 10.0), row("transformers b", 3.0, 20.0),
            row("kernels (torch)", 2.0, 30.0, "forward")]
    (found,) = against.ratios(rows)
    assert (found["against"], found["speedup"], found["memory_ratio"]) == ("transformers b", 1.5, 1.5)


@pytest.mark.parametrize("mode", bench_router.MODES)
def test_router(mode, quick, lines):
    assert bench_router.main(["--device", "cpu", "--shapes", "24,32,16,4", "--seconds", "0", "--modes", mode,
                              "--dtypes", "bfloat16", "--losses", "--out", str(lines.path)]) == 0
    rows = lines.read()
    missing = {row["provider"]: row["reason"] for row in rows if "reason" in row}
    assert set(missing) == ({"transformers"} if mode == "sigmoid" else set())
    want = {"kernels (torch)", "torch", "torch, choice only", "transformers"} - set(missing)
    assert {row["provider"] for row in timed(rows) if row["op"] == f"router: {mode}"} == want
    assert {row["provider"] for row in timed(rows) if row["op"] == f"router: {mode}: losses"} == {
        "kernels (torch)", "torch"}
    assert all(row["percent_of_copy"] > 0 for row in timed(rows))


# ------------------------------------------------------------------------- peers that are not installed where tests run

def stand_ins():
    """The public names that the adapters use, with the meaning their own sources give them, in plain torch."""
    def dense(x, w_gate, w_up, w_down, expert_TK, weight_TK):
        """Matrices [E, F, D], [E, F, D] and [E, D, F]."""
        out_TD = torch.zeros_like(x)
        for e in range(len(w_down)):
            y = (F.silu(x @ w_gate[e].T) * (x @ w_up[e].T)) @ w_down[e].T
            out_TD = out_TD + y * (weight_TK * (expert_TK == e)).sum(dim=1, keepdim=True).to(x.dtype)
        return out_TD

    def liger(x, w_gate_up, w_down, expert_TK, weight_TK):
        return dense(x, *w_gate_up.chunk(2, dim=1), w_down, expert_TK, weight_TK)

    def sort_count(expert_TK, num_experts):
        sorted_N, order_N = expert_TK.flatten().sort()
        return sorted_N, order_N, torch.bincount(sorted_N, minlength=num_experts).cumsum(0)

    def parallel_linear(x, w, k, sorted_N, order_N, end_E, grouped_in=False, grouped_out=False, gates=None):
        rows = x if grouped_in else x[order_N // k]
        y_ND = torch.stack([row @ w[e] for row, e in zip(rows, sorted_N, strict=True)])
        if grouped_out:
            return y_ND
        y_ND = torch.zeros_like(y_ND).index_put((order_N,), y_ND)
        return (y_ND.view(*gates.shape, -1) * gates[..., None]).sum(dim=1)

    def sonic(x, scores, token_N, expert_N, w1, b1, w2, b2, E, stream, activation):
        w_gate, w_up = w1.permute(2, 0, 1)[:, ::2], w1.permute(2, 0, 1)[:, 1::2]
        T, K = x.shape[0], len(token_N) // x.shape[0]
        assert token_N.tolist() == sorted(token_N.tolist()) and activation == "swiglu"
        return dense(x, w_gate, w_up, w2.permute(2, 0, 1), expert_N.view(T, K), scores.view(T, K)), None

    class Dropless(torch.nn.Module):
        def __init__(self, arguments):
            super().__init__()
            self.sizes = arguments.moe_num_experts, arguments.ffn_hidden_size, arguments.hidden_size
            self.mlp = torch.nn.Module()
            for name in ("w1", "v1", "w2"):
                self.mlp.register_parameter(name, torch.nn.Parameter(torch.empty(0)))

        def forward(self, x_T1D, scores, weight_TK, expert_TK):
            w1, v1, w2 = (getattr(self.mlp, name).view(self.sizes) for name in ("w1", "v1", "w2"))
            return dense(x_T1D[:, 0], w1, v1, w2.mT, expert_TK, weight_TK)[:, None]

    space = SimpleNamespace
    return {
        "liger_kernel.ops.fused_moe": space(LigerFusedMoEFunction=space(apply=liger)),
        "scattermoe": space(flatten_sort_count=sort_count, parallel_linear=parallel_linear),
        "sonicmoe.enums": space(ActivationType=space(SWIGLU="swiglu")),
        "sonicmoe.functional": space(moe_general_routing_inputs=sonic),
        "megablocks.layers.arguments": space(Arguments=lambda **given: space(**given)),
        "megablocks.layers.dmoe": space(ParallelDroplessMLP=Dropless),
    }


def test_adapters_bring_weights_and_gradients_into_the_peers_layout_and_back(quick, monkeypatch):
    for name, module in stand_ins().items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), SimpleNamespace())
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    shape = dict(T=10, D=8, F=6, E=3, K=2)
    point = bench_experts.point_of(shape, torch.float32, "cpu", "even")
    inputs = bench_experts.Inputs(point)
    want = bench_experts.plain(inputs)
    want = want.named(want.both())
    peers = [p for p in bench_experts.providers(inputs) if p.name in PEERS]
    assert {p.name for p in peers} == PEERS
    for peer in peers:
        step = peer.make()
        assert harness.distance(step.named(step.both()), want, 1e-4) < 1e-5, peer.name
