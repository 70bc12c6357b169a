"""`polyclinic data`: build the demonstration corpus, look at text, curate it. Needs no cluster and no GPU."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from launch.commands.terminal import bar, ended_in_order, say, written
from launch.graph import RunFailed
from moe.errors import InputError
from moe.whole import whole_or_absent

app = typer.Typer(no_args_is_help=True, help="Build the demonstration corpus, look at text, curate it.\n\n"
                                             "Example: polyclinic data inspect reports.jsonl")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
MANIFEST = "manifest.json"
MOST_NAMED = 20  # sources or columns: of those of a row each there may be a million


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="The corpus's folder; must not exist.")],
    domain: Annotated[list[str] | None, typer.Option(
        help="public, billing, radiology or pharmacology; may be repeated. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of all that is made up.")] = 20,
    max_characters: Annotated[int | None, typer.Option(min=1, help="Of each domain's training documents.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the demonstration corpus: documents, questions and preferences of each domain, and a manifest.

    It comes out of the packages of the extra `data` and of templates: no patient's record. Not for clinical use.

    Example: polyclinic data build corpus --domain radiology --max-characters 1400000
    """
    from moe.data import demonstration

    if out.exists():
        raise InputError(f"{out} exists: want a folder that does not")
    domains = list(dict.fromkeys(domain or demonstration.SPECIALTIES))
    for name in domains:
        demonstration.check_installed(name)
    made: dict[str, Any] = {}
    with written(out), whole_or_absent(out) as partial, bar() as shown:
        task = shown.add_task("domains", total=len(domains))
        for name in domains:
            shown.update(task, description=name)
            made[name] = demonstration.build(name, partial / name, seed=seed, max_characters=max_characters)
            shown.advance(task)
    if as_json:
        print(json.dumps(made, indent=1))
        return
    table = Table("domain", "file", title=f"{out}, seed {seed}")
    for heading in ("rows", "characters"):
        table.add_column(heading, justify="right")
    for name, manifest in made.items():
        for file, counts in manifest["files"].items():
            table.add_row(name, file, f"{counts['rows']:,}", f"{counts['characters']:,}")
    console = Console()
    console.print(table)
    say(f"sources and their licences are in each {MANIFEST}. Not for clinical use.")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(
        help="A .jsonl or .parquet file, a folder of them, as `data build` and `curate` write, or of packed shards.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Count tokens by this tokenizer.json, or a model's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count what is there: rows, lengths, duplicates, licences; and hold files against their manifest. No row's text is
    ever shown.

    Exit status: 0 where all is whole, 1 where a file is damaged, 2 where there is nothing to look at.

    Examples: polyclinic data inspect reports.parquet; polyclinic data inspect runs/quickstart/stages/data-billing/train
    """
    from moe.data.inspection import inspect as look

    with bar() as shown:
        task = shown.add_task("rows", total=None)
        found = look(path, tokenizer, lambda done, total: shown.update(task, completed=done, total=total))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    if found["damages"]:
        raise RunFailed(f"{path} is not what its manifest says: {len(found['damages'])} files differ")


@app.command()
def curate(
    inputs: Annotated[list[Path], typer.Argument(help="Files of documents, .jsonl or .parquet with a text column.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; must not exist.")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="Evaluation rows that no document may hold a piece of; may "
                                                            "be repeated.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings; moe/data/curation/settings.py has all.")
                      ] = None,
    names: Annotated[str | None, typer.Option(help="An installed spaCy model that finds people and places.")] = None,
    key: Annotated[Path | None, typer.Option(help="A file of random bytes: pseudonyms instead of [NAME].")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one for each core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would become of the rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """De-identify, filter, deduplicate and decontaminate documents, with an account of every row that went or changed.

    Wants the extra `curate`. What is found is what patterns find: look at a sample before you rely on it. Stopped by
    Ctrl-C, SIGTERM or SIGHUP (exit status 130, 143, 129) it leaves nothing behind.

    Example: polyclinic data curate reports.jsonl notes.parquet --against exams.jsonl --out curated
    """
    from moe.data.curation import settings as sections
    from moe.data.curation.curation import curate as run
    from moe.data.curation.workers import WorkerLost

    if (out is None) is not dry_run:
        raise InputError("want --out FOLDER, or --dry-run, and not both")
    settings = sections.load(config) if config else sections.Settings()
    given = {name: value for name, value in (("names", names), ("key", key)) if value is not None}
    if given:
        settings = settings.changed(**given)
    with written(out) if out else _counted(), bar() as shown:
        task = shown.add_task("reading", total=None)
        try:
            manifest = run(inputs, out, against or [], settings, workers or len(os.sched_getaffinity(0)),
                           lambda what, done, total: shown.update(task, description=what, completed=done, total=total))
        except WorkerLost as error:
            raise RunFailed(str(error)) from None
    if as_json:
        print(json.dumps(manifest, indent=1))
        return
    _show_curation(manifest, out)


@contextmanager
def _counted() -> Iterator[None]:
    """Around what writes nothing that stays."""
    try:
        with ended_in_order():
            yield
    except OSError as error:
        raise RunFailed(f"no room in {tempfile.gettempdir()} for the rows meanwhile: {error.strerror or error}; set "
                        "TMPDIR to a folder that has it") from error


def _show(found: dict[str, Any]) -> None:
    first = next(iter(found["files"].values()), {})
    counts = [key for key in first if key not in ("bytes", "not_unicode", "length_quantiles", "licences")]
    unit = "characters" if found["kind"] == "rows" else "tokens"
    say(f"{found['path']}: lengths in {unit}")
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold", min_width=10)  # to be read whole, and the numbers beside it
    for heading in (*(key.replace("exact_", "").replace("_", " ") for key in counts), "median", "longest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, own in found["files"].items():
        lengths = (own["length_quantiles"].get(key, 0) for key in ("median", "largest"))
        table.add_row(name, *(f"{value:,}" for value in (*(own[key] for key in counts), *lengths)))
    if found["files"]:
        Console().print(table)
    licences = {(licence, source): None for own in found["files"].values() for licence, source in own["licences"]}
    for line in _first([f"{source}: {licence}" for licence, source in licences]):
        say(line)
    for name, own in found["files"].items():
        if count := own.get("not_unicode"):
            say(f"{name}: {count:,} rows are not Unicode, and cannot be trained on")
    for damage in found["damages"]:
        say(f"DAMAGED {damage}")
    if found["verified"]:
        say(f"{found['verified']} files are what their manifest says")


def _first(names: Sequence[str]) -> list[str]:
    """So many as can be read."""
    return [*names[:MOST_NAMED], *([f"and {len(names) - MOST_NAMED:,} more"] if len(names) > MOST_NAMED else [])]


def _show_curation(manifest: dict[str, Any], out: Path | None) -> None:
    table = Table("step", title="what became of the rows")
    for heading in ("rows", "kept", "removed", "changed"):
        table.add_column(heading, justify="right")
    table.add_column("why")
    for step in manifest["steps"]:
        why = step["reasons"] | step.get("found", {})
        table.add_row(step["step"], f"{step['rows']:,}", f"{step['kept']:,}", f"{step['removed']:,}",
                      f"{step['changed']:,}" if "changed" in step else "",
                      ", ".join(f"{reason} {count:,}" for reason, count in why.items()))
    Console().print(table)
    for warning in manifest["warnings"]:
        say(f"note: {warning}")
    if manifest["left_out_columns"]:
        say(f"columns that were left out: {', '.join(_first(manifest['left_out_columns']))}")
    say(f"{manifest['rows']:,} rows" + (f" in {out}; what happened to which is in {out / 'changes.jsonl'}" if out else
                                         " would be left; nothing is written"))  # fmt: skip
