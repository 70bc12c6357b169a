"""What commands that use a model share: where it is loaded, whose packs are used, and how much of what each stakeholder
group prefers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe.errors import InputError

if TYPE_CHECKING:
    from moe.hf.folder import ModelFolder

Owners = Annotated[str | None, typer.Option(help="Only packs of these, comma-separated; none: the anchor.")]
Mix = Annotated[str | None, typer.Option(
    metavar="GROUP=LAMBDA,...", help="So much of what stakeholder groups prefer: patient=0.7,clinician=0.3.")]


def load(model: Path) -> "ModelFolder":
    """Onto the GPU where there is one."""
    import torch  # takes seconds: only where a model is read

    from moe.hf import folder

    return folder.load(model, "cuda" if torch.cuda.is_available() else "cpu")


def chosen(owners: str) -> list[str]:
    """Each once, in the order in which they are named."""
    return list(dict.fromkeys(name for part in owners.split(",") if (name := part.strip()) not in ("", "none")))


def mix_in(loaded: "ModelFolder", mix: str | None) -> None:
    """Raises InputError for what is no mix, or none of this model's."""
    if mix is None:
        return
    weights: dict[str, float] = {}
    for part in map(str.strip, mix.split(",")):
        group, _, said = part.partition("=")
        try:
            weight = float(said)
        except ValueError:
            raise InputError(f"--mix {part}: want GROUP=LAMBDA, such as patient=0.7") from None
        if group in weights:
            raise InputError(f"--mix {mix} names {group} twice: want one lambda for each group")
        weights[group] = weight
    loaded.mix(weights)
