"""`--owners`, of the commands that use a merged model."""

from typing import Annotated

import typer

Owners = Annotated[str | None, typer.Option(help="Only packs of these, comma-separated; none: the anchor.")]


def chosen(owners: str) -> list[str]:
    return [name for name in owners.split(",") if name not in ("", "none")]
