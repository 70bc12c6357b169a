"""Runs' folders as far as the report reads them: with figures that meet every bound, and hashes that fit each other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe import manifest as manifests
from moe import stage_folder
from moe.config import MOST_SUBSETS, PUBLIC
from moe.config_file import check, dump
from moe.manifest import value_hash
from moe.run_folder import SPLITS, RunFolder

RHO = 0.05
BEGAN = 1_790_000_000.0  # seconds since 1970: 2026-09-21 13:33:20 UTC
H0, MERGED = "a0" * 32, "be" * 32
LICENCES = {"code-tables==1.5.0": "public domain", "report-grammar": "Apache-2.0"}
TRAIN = dict(batch_size=8, micro_batch_size=2, learning_rate=3e-3, warmup_steps=2, evaluate_every=2,
             checkpoint_every=2)  # fmt: skip


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def put_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def metrics(steps: int, **more: Any) -> list[dict[str, Any]]:
    """What a job says of its updates."""
    rows = []
    for step in range(1, steps + 1):
        rows.append({
            "step": step, "world_size": 2, "loss": 3 + 4 / step, "z_loss": 0.2, "learning_rate": 1e-3 * step / steps,
            "gradient_norm": 1 + 1 / step, "tokens_per_s": 5000.0 + 10 * step, "mfu": 0.31,
            "peak_memory_bytes": 2**30, **more,
        })  # fmt: skip
    return rows


def event(name: str, after: float, attempt: int = 1, size: int = 2, step: int = 0, reason: str | None = None
          ) -> dict[str, Any]:  # fmt: skip
    return {"time": BEGAN + after, "event": name, "attempt": attempt, "size": size, "step": step, "reason": reason}


def put_data(run: RunFolder, domain: str, splits: tuple[str, ...], demonstration: bool) -> None:
    for number, split in enumerate(splits):
        values = {"documents": 1234 + number, "tokens": 56789, "bytes": 234567, "domain": domain}
        run.shards(domain, split).mkdir(parents=True)
        manifests.write(run.shards(domain, split) / "manifest.json", values)
    if demonstration:
        put(run.stage(f"data-{domain}") / "corpus" / "manifest.json", {"sources": LICENCES})
    put_done(run, f"data-{domain}", {"train_tokens": 56789}, 61.7)


def put_done(run: RunFolder, stage: str, outputs: dict[str, Any], seconds: float, inputs: str = "0" * 64) -> None:
    put(run.stage(stage) / "DONE", {"inputs": inputs, "outputs": outputs, "seconds": seconds})


def put_head(run: RunFolder, config: Any) -> str:
    """config.yaml and manifest.json; the config's hash."""
    put(run.config, dump(config))
    config_hash = value_hash(config.model_dump(mode="json"))
    put(run.manifest, {"config_hash": config_hash, "commit": "c0" * 20, "versions": {"python": "3.11.7", "torch": "2"},
                       "notice": "Not for clinical use."})  # fmt: skip
    return config_hash


def specialty_results(owners: tuple[str, ...], num_layers: int) -> dict[str, Any]:
    """Figures that meet every bound."""

    def texts(anchor: float, merged: float, alone: dict[str, float]) -> dict[str, Any]:
        return {"anchor_bpb": anchor, "merged_bpb": merged, "without_bpb": {o: alone.get(o, merged) for o in owners}}

    share = {
        text: {expert: 0.9 if expert == text else 0.1 / len(owners) for expert in ("anchor", *owners)}
        for text in (PUBLIC, *owners)
    }
    return {
        "schema": 1,
        "commit": "c0" * 20,
        "device": "CPU, 2 cores",
        "anchor_hash": H0,
        "model_hash": MERGED,
        "wall_s": {},
        "public": {**texts(3.0, 3.01, {}), "win_rate": dict.fromkeys(owners, RHO + 0.004)},
        "specialties": {
            owner: {**texts(4.0, 3.2, {owner: 4.01}), "pack_bpb": 3.19, "without_owner_bpb": 4.01} for owner in owners
        },
        "optout": {"subsets": min(2 ** len(owners), MOST_SUBSETS), "bitwise_equal": True, "plain_router_differs": True},
        "routing": {
            "purity": dict.fromkeys(owners, 0.9),
            "purity_by_layer": {owner: [0.9] * num_layers for owner in owners},
            "share": share,
            "share_by_layer": {text: [row] * num_layers for text, row in share.items()},
        },
        "throughput": {},
    }


def make_specialty_run(folder: Path, owners: tuple[str, ...] = ("billing", "radiology"), num_layers: int = 2,
                       steps: int = 4, finished: bool = True) -> RunFolder:  # fmt: skip
    run, train = RunFolder(folder), {"steps": steps, **TRAIN}
    config = check({
        "run": {"name": "toy", "seed": 1},
        "tokenizer": {"vocab_size": 280},
        "model": {"d_model": 32, "num_layers": num_layers, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24,
                  "context_length": 16},
        "public": {"demonstration": "public"},
        "owners": {owner: {"slot": slot, "data": {"documents": [f"/private/of {owner}/reports.jsonl"]}}
                   for slot, owner in enumerate(owners, 1)},
        "anchor": train,
        "pack": {"train": train, "replay_share": 0.125},
        "calibration": {"rho": RHO},
    })  # fmt: skip
    results = {**specialty_results(owners, num_layers), "config_hash": put_head(run, config)}
    put_data(run, PUBLIC, SPLITS, demonstration=True)
    public = run.shards(PUBLIC, "train") / "manifest.json"
    for owner in owners:
        put_data(run, owner, SPLITS[:2], demonstration=False)
    put_done(run, "anchor", {"anchor_hash": H0}, 8.25)
    packs = {}
    for slot, owner in enumerate(owners, 1):
        tensors = {"layers.0.row": value_hash([owner, "row"]), "layers.0.bias": value_hash([owner, "bias"])}
        manifest = run.shards(owner, "train") / "manifest.json"
        pack = {
            "schema": 1, "owner": owner, "slot": slot, "anchor_hash": H0, "tensors": tensors,
            "data": value_hash(manifests.read(manifest)), "public_data": value_hash(manifests.read(public)),
            "training": value_hash(owner),
        }  # fmt: skip
        run.pack(owner).mkdir(parents=True)
        manifests.write(run.pack(owner) / "pack.json", pack)
        packs[f"pack-{owner}"] = {"slot": slot, "anchor_hash": H0, "tensors": tensors}
        put_done(run, f"pack-{owner}", packs[f"pack-{owner}"], 75.0)
    merged = stage_folder.inputs_hash("merge", None, packs)
    put_done(run, "merge", {"anchor_hash": H0, "model_hash": MERGED}, 1.5, merged)
    for domain in (PUBLIC, *owners):
        put_done(run, f"measure-{domain}", {"optout": results["optout"]}, 7500.0)
    for job in ("anchor", *packs):
        rows = metrics(steps)
        rows[-1]["held_out_bpb"] = 3.0
        put_lines(run.stage(job) / "metrics.jsonl", rows)
        put_lines(run.stage(job) / "events.jsonl", [event("started", 0.0), event("finished", 60.0, step=steps)])
    if finished:
        put(run.results, results)
    return run


def make_job_run(folder: Path, steps: int = 8, num_experts: int = 4, domains: tuple[str, ...] = ("billing", "public"),
                 finished: bool = True, dense: bool = False) -> RunFolder:  # fmt: skip
    run, num_layers = RunFolder(folder), 3
    model = {"d_model": 32, "num_layers": num_layers, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24,
             "context_length": 16}  # fmt: skip
    if not dense:
        model["mixture"] = {"num_experts": num_experts, "top_k": 2, "d_ff": 24, "dense_layers": [0]}
    config = check({
        "run": {"name": "job", "seed": 1},
        "tokenizer": {"vocab_size": 280},
        "model": model,
        "domains": {domain: {"demonstration": domain} for domain in domains},
        "train": {"steps": steps, **TRAIN},
        "cluster": {"workers": 2},
    })
    config_hash = put_head(run, config)
    for domain in domains:
        put_data(run, domain, SPLITS[:2], demonstration=True)
    even = [1 / num_experts] * num_experts
    loads = [even, [0.5, 0.5, *[0.0] * (num_experts - 2)]]
    shares = {domain: loads[::-1] if number % 2 else loads for number, domain in enumerate(domains)}
    more = {} if dense else {
        "balance_loss": 1.1, "routing": {"max_violation": 0.4, "entropy": 0.9, "idle": 1, "load": loads}}
    rows = metrics(steps, **more)
    for row in rows[1::2]:
        row |= {"held_out_bpb": 3.0, "domains": dict.fromkeys(domains, 3.0)} | ({} if dense else {"share": shares})
    put_lines(run.stage("train") / "metrics.jsonl", rows)
    put_lines(run.stage("train") / "events.jsonl", [
        event("started", 0.0),
        event("failed", 30.0, step=2, reason="rank 1 of 2 on 10.0.0.7 was killed (SIGKILL) in /home/someone/runs/job"),
        event("started", 41.0, attempt=2, size=1, step=2),
        *([event("finished", 90.0, attempt=2, size=1, step=steps)] if finished else []),
    ])  # fmt: skip
    if finished:
        own = {domain: {"bpb": 2.9, "bytes": 4096} for domain in domains}
        put_done(run, "train", {"domains": own}, 90.0)
        routing = {} if dense else {"routing": {"max_violation": 0.4, "entropy": 0.9, "idle": 1, "share": shares}}
        put(run.results, {
            "schema": 1, "kind": "job", "config_hash": config_hash, "commit": None, "device": "CPU, 2 cores",
            "wall_s": {}, "bpb": 2.9, "domains": {d: {"bpb": 2.9, "train_tokens": 56789} for d in domains}, **routing,
            "throughput": {},
        })  # fmt: skip
    return run


def change(path: Path, **values: Any) -> None:
    """Of a JSON file some values."""
    put(path, json.loads(path.read_text()) | values)


@pytest.fixture(scope="session")
def specialty_run():
    """A function: a specialty run's folder."""
    return make_specialty_run


@pytest.fixture(scope="session")
def job_run():
    """A function: an ordinary training job's folder, which lost a worker after update 2."""
    return make_job_run


@pytest.fixture(scope="session")
def change_json():
    return change


@pytest.fixture(scope="session")
def append_events():
    """A function: put events at the end of a stage's, each given as the arguments of `event`."""

    def append(run: RunFolder, stage: str, *rows: dict[str, Any]) -> None:
        with (run.stage(stage) / "events.jsonl").open("a") as file:
            file.writelines(json.dumps(event(**row)) + "\n" for row in rows)

    return append


@pytest.fixture(scope="session")
def results_that_hold():
    """A function: results of a specialty run that meet every bound."""
    return specialty_results


def pytest_make_parametrize_id(val):
    return "nan" if isinstance(val, float) and math.isnan(val) else None
