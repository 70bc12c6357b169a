"""What the hashes in a specialty run's folder prove, each checked against the other files that name it.

Hashes of weights are taken as they were recorded when the weights were written; the weights themselves are not read
here. `polyclinic optout` reads them, and writes a certificate of what it took out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe import manifest as manifests
from moe import stage_folder
from moe.config import ANCHOR, PUBLIC
from moe.manifest import value_hash
from moe.report.record import Record, Row


@dataclass(frozen=True)
class Check:
    what: str
    means: str
    hash: str | None
    holds: bool | None  # None where what it needs is not in the folder


def packs(record: Record) -> dict[str, Row]:
    """By owner: what pack.json says, with its hash; `intact` where it is as it was written."""
    found = {}
    for owner in record.config["owners"]:
        path = record.run.pack(owner) / "pack.json"
        if path.is_file():
            try:
                values = manifests.read(path)
                found[owner] = {**values, "hash": value_hash(values), "intact": True}
            except ValueError:
                found[owner] = {"owner": owner, "hash": None, "intact": False}
    return found


def checks(record: Record) -> list[Check]:
    owners, results = list(record.config["owners"]), record.results
    merge, held = record.done("merge"), packs(record)
    trained = {owner: record.done(f"pack-{owner}") for owner in owners}
    anchor = record.done(ANCHOR)
    found = [
        Check(
            "Anchor, H0",
            "All packs and the merge name this anchor, and it is the one that its training wrote.",
            results["anchor_hash"],
            _all([
                anchor and anchor["outputs"]["anchor_hash"] == results["anchor_hash"],
                merge and merge["outputs"]["anchor_hash"] == results["anchor_hash"],
                *(held.get(owner) and held[owner].get("anchor_hash") == results["anchor_hash"] for owner in owners),
            ]),
        )
    ]
    for owner in owners:
        pack, done = held.get(owner), trained[owner]
        manifest = record.manifest_hash(owner, "train")
        found += [
            Check(
                f"Pack of {owner}",
                "pack.json is as it was written, and its tensors have the hashes that they had when training ended.",
                pack and pack["hash"],
                _all([pack and pack["intact"], pack and done and pack.get("tensors") == done["outputs"]["tensors"]]),
            ),
            Check(
                f"Text of {owner}",
                "The pack was trained on the owner's own text with this manifest, and beside it on public text only.",
                pack and pack.get("data"),
                _all([
                    pack and manifest and pack.get("data") == manifest,
                    pack and (public := record.manifest_hash(PUBLIC, "train")) and pack.get("public_data") == public,
                ]),
            ),
        ]
    wanted = None
    if merge and all(trained.values()):
        needed = {f"pack-{owner}": done["outputs"] for owner, done in trained.items()}
        wanted = stage_folder.inputs_hash("merge", None, needed) == merge["inputs"]
    return [
        *found,
        Check(
            "Inputs of the merge",
            "The merge was given these packs and no others.",
            merge and merge["inputs"],
            wanted,
        ),
        Check(
            "Merged model",
            "What was measured is what the merge wrote.",
            results["model_hash"],
            _all([merge and merge["outputs"]["model_hash"] == results["model_hash"]]),
        ),
    ]


def optout(record: Record) -> list[Row]:
    """Of each domain's text: what was compared for every subset of owners."""
    found = []
    for domain in record.data_sections:
        done = record.done(f"measure-{domain}")
        if done:
            found.append({"domain": domain, **done["outputs"]["optout"]})
    return found


def _all(parts: Sequence[bool | object | None]) -> bool | None:
    """False where one part is wrong, None where one is missing and none is wrong."""
    if any(part is False for part in parts):
        return False
    return None if any(not part for part in parts) else True
