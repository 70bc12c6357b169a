"""Each benchmark from its command line to its JSON lines, at a shape that takes no time."""

import pytest
import torch

from benchmarks import bench_experts, bench_layer, bench_router
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


def test_ratios_are_against_the_fastest_peer():
    def row(provider, ms, peak, which="both"):
        return {"op": "layer", "shape": {}, "dtype": "float32", "load": "even", "pass": which, "provider": provider,
                "percent_of_p": 50.0, "ms": ms, "peak_mib": peak, "void": False}

    rows = [row("kernels (torch)", 2.0, 30.0), row("transformers a", 5.0, 10.0), row("transformers b", 3.0, 20.0),
            row("kernels (torch)", 2.0, 30.0, "forward")]
    (found,) = bench_layer.ratios(rows)
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
