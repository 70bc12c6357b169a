"""results.json: every measured figure of a run, with stable keys; numbers, not strings.

All but `wall_s`, `throughput` and what describes the machine is the same for the same config and seed.
"""

import json
from typing import Any

from moe.config import PUBLIC, SpecialtyConfig
from moe.manifest import value_hash
from moe.run_folder import RunFolder
from moe.train.telemetry import pace, read
from moe.whole import write_whole


def write_results(
    config: SpecialtyConfig, run: RunFolder, outputs: dict[str, dict[str, Any]], seconds: dict[str, float], device: str
) -> None:
    """Gather what the stages have given into results.json. `outputs` and `seconds` are by stage."""
    domains = {domain: outputs[f"measure-{domain}"] for domain in (PUBLIC, *config.owners)}
    results = {
        "schema": 1,
        "config_hash": value_hash(config.model_dump(mode="json")),
        "commit": json.loads(run.manifest.read_text())["commit"],
        "device": device,
        "anchor_hash": outputs["merge"]["anchor_hash"],
        "model_hash": outputs["merge"]["model_hash"],
        "wall_s": seconds,
        "public": {
            **_pick(domains[PUBLIC], "anchor_bpb", "merged_bpb", "without_bpb"),
            "win_rate": {name: rate for name, rate in domains[PUBLIC]["win_rate"].items() if name != "anchor"},
        },
        "specialties": {
            owner: {
                **_pick(domains[owner], "anchor_bpb", "pack_bpb", "merged_bpb"),
                "without_owner_bpb": domains[owner]["without_bpb"][owner],
                "without_bpb": domains[owner]["without_bpb"],
            }
            for owner in config.owners
        },
        "optout": {
            "subsets": domains[PUBLIC]["optout"]["subsets"],
            "bitwise_equal": all(figures["optout"]["bitwise_equal"] for figures in domains.values()),
            "plain_router_differs": any(figures["optout"]["plain_router_differs"] for figures in domains.values()),
        },
        "routing": {
            "purity": {owner: domains[owner]["purity"] for owner in config.owners},
            "purity_by_layer": {owner: domains[owner]["purity_by_layer"] for owner in config.owners},
            "share": {domain: figures["share"] for domain, figures in domains.items()},
            "share_by_layer": {domain: figures["share_by_layer"] for domain, figures in domains.items()},
        },
        "throughput": {
            **({"anchor": throughput(run, "anchor", config.cluster.anchor_workers)} if config.anchor.steps else {}),
            **{
                f"pack-{owner}": throughput(run, f"pack-{owner}", config.cluster.owner_workers)
                for owner in config.owners
            },
        },
    }
    write_whole(run.results, json.dumps(results, indent=1) + "\n")


def _pick(figures: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: figures[name] for name in names}


def throughput(run: RunFolder, stage: str, world_size: int) -> dict[str, float]:
    """Of the updates that were made on so many ranks: after a fault there may have been fewer for a while."""
    rows = read(run.stage(stage) / "metrics.jsonl")
    return pace([row for row in rows if row["world_size"] == world_size] or rows) | {"world_size": world_size}
