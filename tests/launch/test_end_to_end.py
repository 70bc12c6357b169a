"""Whole runs of the command, as a user starts it: Ray, DeepSpeed, all stages, at the smallest size that shows enough.

The runs differ in one thing each, and what they have made is compared by hash.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe.hashing import tensor_hashes
from moe.hf import folder as model_folder
from moe.specialty.merge import merge
from moe.specialty.pack import Pack
from moe.train.telemetry import read

ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # seconds a run may take on a busy machine; a quiet one needs 40
DOMAINS = {"public": 300, "billing": 150, "radiology": 150}  # documents
TIMED = ("wall_s", "throughput")  # what may differ between equal runs


def write_text(folder: Path, domain: str, count: int) -> Path:
    """Documents of a domain: sentences of its own words among common ones."""
    rng = random.Random(domain)
    own = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(60)]
    common = [f"word{n}" for n in range(40)]
    path = folder / f"{domain}.jsonl"
    rows = (" ".join(rng.choice(own if rng.random() < 0.7 else common) for _ in range(60)) for _ in range(count))
    path.write_text("".join(json.dumps({"id": f"{domain}-{n}", "text": text}) + "\n" for n, text in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """A folder with every domain's text and a config of the smallest run; its runs go to runs/."""
    folder = tmp_path_factory.mktemp("clinic")
    texts = {domain: {"documents": [str(write_text(folder, domain, count))]} for domain, count in DOMAINS.items()}
    train = dict(
        batch_size=4, micro_batch_size=2, learning_rate=3e-3, warmup_steps=2, evaluate_every=50, checkpoint_every=50
    )
    config = {
        "run": {"name": "first", "seed": 3},  # in the folder runs of where the command is started
        "tokenizer": {"vocab_size": 400},
        "model": {
            "d_model": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 96, "context_length": 64,
        },
        "public": texts["public"],
        "owners": {name: {"slot": slot, "data": texts[name]} for slot, name in ((1, "billing"), (2, "radiology"))},
        "anchor": {**train, "steps": 150},
        "pack": {"train": {**train, "steps": 60}, "replay_share": 0.125, "router_tokens": 2000, "fit_router_every": 20},
        "calibration": {"tokens": 1000},
        "evaluation": {"optout_tokens": 200},
    }  # fmt: skip
    (folder / "clinic.yaml").write_text(yaml.safe_dump(config))
    return folder


def start(clinic: Path, *arguments: str) -> subprocess.Popen:
    code = "from launch.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", str(clinic / "clinic.yaml"), *arguments],
        cwd=clinic,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(status, what was shown, what was complained of)"""
    try:
        shown, complained = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, shown, complained


def run(clinic: Path, name: str, *arguments: str) -> Path:
    status, shown, complained = finish(start(clinic, f"run.name={name}", *arguments))
    assert status == 0, f"{shown}\n{complained}"
    assert complained == "", "a run that goes well is quiet"
    return clinic / "runs" / name


def results(run: Path) -> dict:
    """What equal runs must agree on."""
    every = json.loads((run / "results.json").read_text())
    return {key: value for key, value in every.items() if key not in (*TIMED, "config_hash")}


@pytest.fixture(scope="module")
def first(clinic):
    return run(clinic, "first")


def test_a_run_leaves_what_it_promises(first):
    made = {path.name for path in first.iterdir()}
    assert made == {"config.yaml", "manifest.json", "tokenizer.json", "stages", "packs", "model", "results.json",
                    "report.html"}  # fmt: skip
    assert {path.name for path in (first / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert [row["step"] for row in read(first / "stages/anchor/metrics.jsonl")] == list(range(1, 151))
    figures = results(first)
    assert figures["optout"]["subsets"] == 4 and figures["optout"]["bitwise_equal"] is True
    for name, specialty in figures["specialties"].items():
        assert specialty["merged_bpb"] < specialty["anchor_bpb"], name
        assert specialty["merged_bpb"] < specialty["without_owner_bpb"], name


@pytest.mark.slow
def test_a_model_that_is_there_already_can_be_the_anchor(first, clinic):
    """Left as it is, bit for bit, also where packs are trained in another precision: they fit it wherever it lies."""
    base = model_folder.load(first / "stages/anchor/model")
    base.decoder.cast(torch.float32)
    with torch.no_grad():
        for weight in base.decoder.parameters():
            weight.mul_(1 + 1e-4)  # to what bfloat16 cannot hold
    model_folder.save(clinic / "base", base)
    other = run(clinic, "based", f"base.model={clinic / 'base'}", "anchor.steps=0", "owners.radiology=null",
                "run.precision=bfloat16")  # fmt: skip
    pack = Pack.load(other / "packs/billing")
    assert pack.anchor_hash == results(other)["anchor_hash"] == base.identity()
    assert merge(base, [pack]).identity() == results(other)["model_hash"]
    billing = results(other)["specialties"]["billing"]
    assert billing["merged_bpb"] < 0.97 * billing["anchor_bpb"]
    assert (other / "report.html").is_file() and not (other / "stages/anchor/metrics.jsonl").exists()


def test_no_training_text_is_in_what_a_run_says(first, clinic):
    """Logs, metrics and results may name documents; what stands in them stays in the shards."""
    text = json.loads((clinic / "billing.jsonl").read_text().splitlines()[0])["text"]
    phrase = " ".join(text.split()[:3])
    for path in first.rglob("*"):
        if path.is_file() and path.suffix in (".jsonl", ".json", ".html", ".yaml", ".txt", ""):
            assert phrase not in path.read_text(errors="replace"), path


@pytest.mark.parametrize("stage, steps", [pytest.param("anchor", 150, marks=pytest.mark.slow), ("pack-radiology", 60)])
def test_stopped_and_resumed_is_the_same_run(clinic, first, stage, steps):
    """Ctrl-C while one job trains, or two side by side: a checkpoint, status 130; then --resume ends where `first` has
    ended."""
    stopped = clinic / f"runs/stopped-{stage}"
    folder = stopped / "stages" / stage
    if stage != "anchor":  # what comes before it is there
        shutil.copytree(first, stopped)
        (stopped / "results.json").unlink()
        for made in (stopped / "packs", stopped / "model", *(stopped / "stages").glob("[mp]*")):
            shutil.rmtree(made)
    process = start(clinic, f"run.name={stopped.name}", *(["--resume"] if stopped.exists() else []))
    metrics, deadline = folder / "metrics.jsonl", time.time() + TIMEOUT
    while time.time() < deadline and process.poll() is None and not (metrics.exists() and len(read(metrics)) > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    status, shown, complained = finish(process)
    assert status == 130 and "--resume goes on from there" in complained, f"{shown}\n{complained}"
    done = len(read(metrics))
    assert 5 < done < steps, "stopped amid the stage"
    assert (folder / f"checkpoints/step-{done:08}").is_dir()
    run(clinic, stopped.name, "--resume")
    assert results(stopped) == results(first)


def test_an_owner_leaves_a_finished_run(clinic, first):
    """`polyclinic optout`: a smaller model, and the hashes that show that nothing of the owner is left."""
    for name in ("billing", "nobody"):
        code = "from launch.cli import main; main()"
        arguments = ["optout", str(first / "model"), name, "--out", str(clinic / f"without-{name}")]
        end = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        if name == "billing":
            assert end.returncode == 0 and "8 tensors of billing removed, none of them found after" in end.stdout, end
        else:
            assert end.returncode == 2 and "owner nobody is not in the model" in end.stderr, end
            assert not (clinic / "without-nobody").exists()
    proof = json.loads((clinic / "without-billing/certificate.json").read_text())
    assert proof["removed"] == {"billing": 1} and proof["kept_tensors_unchanged"] is True
    gone = set(Pack.load(first / "packs/billing").hashes().values())
    kept = load_file(clinic / "without-billing/model.safetensors")
    assert gone <= set(proof["removed_tensors"].values())
    assert kept["layers.0.ffn.experts.w_down"].shape[0] == 2 and not kept["layers.0.ffn.router.table"][1].any()


def test_one_owners_data_moves_nothing_outside_its_pack(clinic, first):
    """Non-interference: noise for billing's text, all else equal; every other tensor keeps its bits. Owners who join
    later begin so, too: with the anchor that is there."""
    anchor = first / "stages/anchor/model"
    noise = run(clinic, "noise", f"base.model={anchor}", "anchor.steps=0",
                "owners.billing.data={noise_documents: 150, documents: []}")  # fmt: skip
    radiology, other = (Pack.load(each / "packs/radiology").hashes() for each in (first, noise))
    assert radiology == other
    billing, other = (Pack.load(each / "packs/billing").hashes() for each in (first, noise))
    assert all(billing[name] != digest for name, digest in other.items())
    anchors = [tensor_hashes(load_file(each / "stages/anchor/model/model.safetensors")) for each in (first, noise)]
    assert anchors[0] == anchors[1]
    models = [load_file(each / "model/model.safetensors") for each in (first, noise)]
    for name, tensor in models[0].items():
        other = models[1][name]
        if ".experts." in name or ".router." in name:  # slots 0, 1, 2 are the anchor's, billing's, radiology's
            assert tensor_hashes({name: tensor[[0, 2]]}) == tensor_hashes({name: other[[0, 2]]})
        else:
            assert tensor_hashes({name: tensor}) == tensor_hashes({name: other})


@pytest.mark.slow
def test_a_corpus_row_without_text_ends_a_run_with_one_sentence(clinic, first):
    """Found by a worker, after the anchor's data has been read; resuming takes the mended file."""
    path = clinic / "billing.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"id": "blank", "text": " "}\n')
    status, shown, complained = finish(start(clinic, "run.name=blank"))
    path.write_text(whole)
    assert status == 2 and complained.count("\n") == 1, f"{shown}\n{complained}"
    assert "billing.jsonl row 151 has no text" in complained
    assert not (clinic / "runs/blank/results.json").exists() and not (clinic / "runs/blank/packs").exists()
