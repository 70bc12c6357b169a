"""`polyclinic merge` and `polyclinic optout`: packs onto an anchor, and off again. They need no cluster and no GPU."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.terminal import say, written
from launch.graph import RunFailed
from moe.errors import InputError
from moe.whole import whole_or_absent

Out = Annotated[Path, typer.Option(help="The new model's folder; must not exist.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
CERTIFICATE = "certificate.json"


def merge(
    anchor: Annotated[Path, typer.Argument(help="The anchor's folder, such as runs/quickstart/stages/anchor/model.")],
    packs: Annotated[list[Path], typer.Argument(help="Folders of packs, such as runs/quickstart/packs/billing.")],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Stack PACKS beside the ANCHOR that they were trained on. Nothing is trained or averaged, so the order of packs
    does not matter, and each can be taken off again.

    Example: polyclinic merge anchor packs/billing packs/radiology --out merged
    """
    _check_free(out)
    from moe.hf import folder
    from moe.specialty import merge as packs_and_anchor
    from moe.specialty.pack import Pack

    merged = packs_and_anchor.merge(folder.load(anchor), [Pack.load(pack) for pack in packs])
    with written(out), whole_or_absent(out) as partial:
        folder.write(partial, merged)
    said = {"model_hash": merged.identity(), "anchor_hash": merged.anchor_hash, "slots": merged.owners,
            "stakeholders": {owner: sorted(groups) for owner, groups in merged.deltas.items()}}
    if as_json:
        print(json.dumps(said, indent=1))
        return
    aligned = {owner: f", for {' and '.join(groups)}" for owner, groups in said["stakeholders"].items()}
    slots = ", ".join(f"{owner} (slot {slot}{aligned.get(owner, '')})" for owner, slot in merged.owners.items())
    say(f"{out}: {slots} on anchor {said['anchor_hash'][:12]}; the model's hash is {said['model_hash'][:12]}")


def optout(
    model: Annotated[Path, typer.Argument(help="A merged model's folder, such as runs/quickstart/model.")],
    owners: Annotated[list[str], typer.Argument(help="Who leaves.")],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Write MODEL without the packs of OWNERS, the bits of a merge that never had them, and a certificate.

    Example: polyclinic optout runs/quickstart/model billing --out without-billing
    """
    _check_free(out)
    from moe.hf import folder
    from moe.specialty.merge import certificate, opt_out

    before = folder.load(model)
    smaller = opt_out(before, owners)
    with written(out), whole_or_absent(out) as partial:  # so that no model is there without its certificate
        folder.write(partial, smaller)
        proof = certificate(before, folder.load(partial))
        left, unchanged = proof["removed_tensors_found_after"], proof["kept_tensors_unchanged"]
        if left or not unchanged:
            raise RunFailed(f"{out} is not written: it would not be what opting out promises ({len(left)} tensors of "
                            f"{', '.join(owners)} found after; the others {'unchanged' if unchanged else 'CHANGED'})")
        (partial / CERTIFICATE).write_text(json.dumps(proof, indent=1) + "\n")
    if as_json:
        print(json.dumps(proof, indent=1))
        return
    say(f"{out}: {len(proof['removed_tensors'])} tensors of {', '.join(owners)} removed, none of them found after; "
         f"all others unchanged; hashes in {CERTIFICATE}")


def _check_free(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists: want a folder that does not")
