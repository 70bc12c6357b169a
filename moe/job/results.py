"""results.json of a job: its measured figures, with stable keys; numbers, not strings.

    {"schema": 1, "kind": "job", "config_hash", "commit", "device", "wall_s": {STAGE: seconds},
     "bpb":        bits per byte of all held-out text
     "domains":    {NAME: {"bpb", "train_tokens"}}
     "routing":    {"max_violation", "entropy", "idle", "share": {NAME: layers x experts}}, of a mixture's held-out text
     "throughput": {"train": {"tokens_per_s", "mfu", "peak_memory_bytes", "world_size"}}}

All but `wall_s`, `throughput` and what describes the machine is the same for the same config and seed, up to roundings.
"""

import json
from typing import Any

from moe.config import JobConfig
from moe.job.stages import TRAIN
from moe.manifest import value_hash
from moe.report.results import throughput
from moe.run_folder import RunFolder
from moe.whole import write_whole


def write_results(
    config: JobConfig, run: RunFolder, outputs: dict[str, dict[str, Any]], seconds: dict[str, float], device: str
) -> None:
    """Gather what the stages have given into results.json. `outputs` and `seconds` are by stage."""
    figures = outputs[TRAIN]
    results = {
        "schema": 1,
        "kind": "job",
        "config_hash": value_hash(config.model_dump(mode="json")),
        "commit": json.loads(run.manifest.read_text())["commit"],
        "device": device,
        "wall_s": seconds,
        "bpb": figures["bpb"],
        "domains": {
            name: {"bpb": figures["domains"][name]["bpb"], "train_tokens": outputs[f"data-{name}"]["train_tokens"]}
            for name in config.domains
        },
        **({"routing": figures["routing"]} if "routing" in figures else {}),
        "throughput": {TRAIN: throughput(run, TRAIN, figures["world_size"])},
    }
    write_whole(run.results, json.dumps(results, indent=1) + "\n")


def table(run: RunFolder) -> list[tuple[str, str, str]]:
    """(domain, training tokens, held-out bits per byte), the last row of all; in words."""
    results = json.loads(run.results.read_text())
    rows = [(name, f"{own['train_tokens']:,}", f"{own['bpb']:.3f}") for name, own in results["domains"].items()]
    tokens = sum(own["train_tokens"] for own in results["domains"].values())
    return [*rows, ("all", f"{tokens:,}", f"{results['bpb']:.3f}")]


def notes(run: RunFolder) -> list[str]:
    """What is to be said beside the table."""
    results = json.loads(run.results.read_text())
    train = results["throughput"][TRAIN]
    workers = train["world_size"]
    said = []
    if routing := results.get("routing"):
        said.append(f"routing of held-out text: largest violation {routing['max_violation']:.2f}, lowest entropy "
                    f"{routing['entropy']:.2f}, {routing['idle']} idle experts in the worst layer")
    said.append(f"training: {train['tokens_per_s']:,.0f} tokens/s on {workers} worker{'s' * (workers > 1)}, "
                f"{train['mfu']:.0%} of a plain product's rate")
    return [*said, f"results {run.results}", f"model   {run.model}"]
