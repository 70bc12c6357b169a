"""Show that an owner's data moves nothing outside its pack: train again with noise in its place, and compare hashes.

    python -m benchmarks.non_interference runs/quickstart --owner billing

RUN must be finished. A second whole run of its config, with documents of random words for the owner's text, goes to
RUN-noise beside it and takes as long as the first. Every tensor of both is hashed. Exit status 1 where one outside the
pack differs, or one inside it does not. The counts are added to benchmarks/results/non_interference.jsonl.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.records import record, results_of
from moe.config_file import load
from moe.hashing import tensor_hash
from moe.hf import folder as model_folder
from moe.run_folder import RunFolder
from moe.specialty.pack import Pack

RESULTS = Path(__file__).parent / "results/non_interference.jsonl"
Hashes = dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--owner", required=True, help="whose data is replaced")
    options = parser.parse_args()
    first = RunFolder(options.run)
    config = load(first.config)
    noise = RunFolder(config.run.folder / f"{config.run.name}-noise")
    documents = json.loads((first.shards(options.owner, "train") / "manifest.json").read_text())["documents"]
    subprocess.run(
        [
            *(sys.executable, "-c", "from launch.cli import main; main()", "train", first.config),
            *("--resume",) * noise.path.exists(),
            f"run.name={noise.path.name}",
            f"owners.{options.owner}.data={{noise_documents: {documents}, demonstration: null, documents: [], "
            "held_out: [], max_characters: null}",
        ],
        check=True,
    )
    counts = compare(hashes(first), hashes(noise), options.owner)
    show(counts, options.owner)
    record(RESULTS, first, owner=options.owner, commit_of_noise=results_of(noise)["commit"], **counts)
    return 0 if counts["outside_changed"] == 0 and counts["pack_unchanged"] == 0 else 1


def hashes(run: RunFolder) -> Hashes:
    """Of every tensor of the anchor, of every pack, and of what each slot has in the merged model."""
    anchor, merged = model_folder.load(run.anchor), model_folder.load(run.model)
    found = {f"anchor: {name}": tensor_hash(t) for name, t in anchor.decoder.state_dict().items()}
    for owner in merged.owners:
        found |= {f"pack {owner}: {name}": digest for name, digest in Pack.load(run.pack(owner)).hashes().items()}
    for name, tensor in merged.decoder.state_dict().items():
        if ".experts." in name:
            slots = {model_folder.owner_of(merged, slot): tensor[n] for n, slot in enumerate(merged.decoder.slots)}
        elif ".router." in name:
            slots = {model_folder.owner_of(merged, slot): tensor[slot] for slot in merged.decoder.slots}
        else:
            slots = {"all": tensor}
        found |= {f"merged, {who}: {name}": tensor_hash(part) for who, part in slots.items()}
    return found


def compare(first: Hashes, noise: Hashes, owner: str) -> dict[str, int]:
    """How many tensors outside the owner's pack there are and have changed, and the same of the pack."""
    assert first.keys() == noise.keys(), "two runs of one config have the same tensors"
    of_owner = [name for name in first if name.startswith((f"pack {owner}:", f"merged, {owner}:"))]
    outside = [name for name in first if name not in of_owner]
    return {
        "outside": len(outside),
        "outside_changed": sum(first[name] != noise[name] for name in outside),
        "pack": len(of_owner),
        "pack_unchanged": sum(first[name] == noise[name] for name in of_owner),
    }


def show(counts: dict[str, int], owner: str) -> None:
    table = Table(title=f"with noise in place of {owner}'s text", title_justify="left")
    for name in ("tensors", "compared", "changed"):
        table.add_column(name, justify="left" if name == "tensors" else "right")
    table.add_row(f"outside {owner}'s pack", str(counts["outside"]), str(counts["outside_changed"]))
    table.add_row(f"{owner}'s pack", str(counts["pack"]), str(counts["pack"] - counts["pack_unchanged"]))
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
