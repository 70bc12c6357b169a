"""`polyclinic feedback`: what people say of answers, kept for the owner's next alignment. Needs no cluster."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from launch.commands.terminal import say, written
from launch.graph import RunFailed
from moe.config import STAKEHOLDERS
from moe.errors import InputError
from moe.whole import write_whole

app = typer.Typer(no_args_is_help=True, help="Keep what people say of answers, for the owner's next alignment.\n\n"
                                             "Example: polyclinic feedback list feedback")

Queue = Annotated[Path, typer.Argument(help="The queue's folder; made where there is none.")]
Owner = Annotated[str | None, typer.Option(help="Whose expert the answer is about.")]
Stakeholder = Annotated[Literal[*STAKEHOLDERS] | None, typer.Option(help="Who judges.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def add(
    queue: Queue,
    owner: Owner = None,
    stakeholder: Stakeholder = None,
    prompt: Annotated[str | None, typer.Option(help="What the model was asked.")] = None,
    answer: Annotated[str | None, typer.Option(help="What it answered, with --thumb.")] = None,
    thumb: Annotated[Literal["up", "down"] | None, typer.Option(help="Whether that was wanted.")] = None,
    chosen: Annotated[str | None, typer.Option(help="The better of two answers, with --rejected.")] = None,
    rejected: Annotated[str | None, typer.Option(help="The other.")] = None,
    model: Annotated[str | None, typer.Option(help="Hash of the model that answered.")] = None,
    comment: Annotated[str | None, typer.Option(help="Why.")] = None,
    from_file: Annotated[Path | None, typer.Option("--from", help="Many at once: JSON lines with these keys.")] = None,
    as_json: AsJson = False,
) -> None:
    """Add one judgement, or those of a file. What is in the queue already is not added twice.

    Examples: polyclinic feedback add feedback --owner radiology --stakeholder patient --prompt "What is J90?"
    --answer "Fluid by the lung." --thumb up; polyclinic feedback add feedback --from judgements.jsonl
    """
    from moe import feedback

    given = {"owner": owner, "stakeholder": stakeholder, "prompt": prompt, "answer": answer, "thumb": thumb,
             "chosen": chosen, "rejected": rejected, "model": model, "comment": comment}
    given = {key: value for key, value in given.items() if value is not None}
    if from_file and given:
        raise InputError(f"--from is given beside --{next(iter(given))}: want one of them")
    if from_file:
        judgements = [feedback.parse(row, f"{from_file} row {number}")
                      for number, row in enumerate(_rows(from_file), start=1)]
    else:
        judgements = [feedback.parse(given, "feedback")]
    try:
        added, known = feedback.add(queue, judgements)
    except OSError as error:
        raise RunFailed(f"{queue} cannot be written: {error.strerror or error}; what is in it stays, and the same "
                        "command adds what is missing") from error
    if as_json:
        print(json.dumps({"added": added, "known": known}))
        return
    say(f"{queue}: {added} added" + (f", {known} there already" if known else ""))


@app.command("list")
def show(
    queue: Queue,
    owner: Owner = None,
    stakeholder: Stakeholder = None,
    show_text: Annotated[bool, typer.Option("--show-text", help="Show prompts and answers, too.")] = False,
    export: Annotated[Literal["dpo", "kto"] | None, typer.Option(
        help="Write rows for alignment: pairs (dpo), or single answers with a label (kto).")] = None,
    out: Annotated[Path | None, typer.Option(help="The file that --export writes; must not exist.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count what the queue has, by owner and group; or write it for alignment. Texts are shown on request only.

    Examples: polyclinic feedback list feedback --owner radiology; polyclinic feedback list feedback --export dpo
    --out preferences.jsonl
    """
    from moe import feedback

    if (export is None) is not (out is None):
        raise InputError("--export and --out belong together: want both")
    if out and out.exists():
        raise InputError(f"{out} exists: want a file that does not")
    found = list(feedback.read(queue, owner, stakeholder))
    if export:
        rows = feedback.as_preferences(found) if export == "dpo" else feedback.as_thumbs(found)
        if not rows:
            raise InputError(f"{out} would have no rows: the queue has no judgements of that kind")
        with written(out):
            write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), feedback.WRITER_ONLY)
        if as_json:
            print(json.dumps({"rows": len(rows), "judgements": len(found)}))
            return
        say(f"{out}: {len(rows)} rows of {len(found)} judgements")
        return
    kinds = [(j.owner, j.stakeholder, j.thumb or "pair") for j in found]
    if as_json:
        counts = [dict(zip(("owner", "stakeholder", "kind", "count"), (*kind, count), strict=True))
                  for kind, count in sorted(Counter(kinds).items())]
        texts = [{"id": j.id, **j.model_dump(mode="json", exclude_none=True)} for j in found] if show_text else []
        print(json.dumps({"counts": counts, **({"judgements": texts} if show_text else {})}, indent=1,
                         ensure_ascii=False))
        return
    _tables(kinds, found if show_text else [])


def _tables(kinds: list[tuple[str, str, str]], found: list[Any]) -> None:
    console = Console()
    table = Table("owner", "stakeholder", title=f"{len(kinds)} judgements")
    for heading in ("up", "down", "pairs"):
        table.add_column(heading, justify="right")
    counts = Counter(kinds)
    for owner, stakeholder in sorted({kind[:2] for kind in kinds}):
        table.add_row(owner, stakeholder, *(str(counts[owner, stakeholder, kind]) for kind in ("up", "down", "pair")))
    console.print(table)
    for judgement in found:
        say(f"\n{judgement.id}  {judgement.time}  {judgement.owner}, {judgement.stakeholder}\n> {judgement.prompt}")
        for mark, text in ((judgement.thumb, judgement.answer), ("better", judgement.chosen),
                           ("worse", judgement.rejected), ("why", judgement.comment)):
            if text is not None:
                say(f"{mark}: {text}")


def _rows(path: Path) -> list[Any]:
    from moe.data import files

    if not path.is_file() or path.suffix not in files.ENDINGS:
        raise InputError(f"--from {path}: want a file that ends in .jsonl or .parquet")
    return list(files.rows(path))
