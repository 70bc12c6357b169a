"""`polyclinic eval`: a model measured on held-out text, and on the tasks of lm-eval. Needs no cluster."""

import json
import tempfile
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from launch.commands.terminal import bar, written
from launch.commands.use_options import Mix, Owners, chosen, load, mix_in
from moe.errors import InputError

if TYPE_CHECKING:
    from moe.hf.folder import ModelFolder

ANCHOR = "anchor alone"


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model's folder, such as runs/quickstart/model.")],
    texts: Annotated[list[str] | None, typer.Argument(
        metavar="[NAME=]FILE", help="Documents, .jsonl or .parquet with a text column: their bits per byte.")] = None,
    owners: Owners = None,
    mix: Mix = None,
    removals: Annotated[bool, typer.Option("--removals", help="Also without each owner, and anchor alone.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of each text; default: all.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-eval, by name; may be repeated.")] = None,
    include: Annotated[Path | None, typer.Option(help="A folder with YAML files of more tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many questions of each task.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each; default: the task's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures, for scripts.")] = False,
) -> None:
    """Measure MODEL: bits per byte of texts it was not trained on, and lm-eval's tasks.

    Examples: polyclinic eval runs/quickstart/model radiology=reports.jsonl --removals;
    polyclinic eval models/smollm2 --task codes --include tasks --limit 200
    """
    files = [_named(text) for text in texts or []]
    _check(files, task or [], include)
    _check_used(files, task or [], removals, max_tokens, {"include": include, "limit": limit, "fewshot": fewshot})
    loaded = load(model)
    subsets = _subsets(loaded, None if owners is None else chosen(owners), removals)
    mix_in(loaded, mix)
    with bar() as shown:
        measured = _bits(loaded, files, subsets, max_tokens, shown)
        found = _tasks(loaded, task, include, limit, fewshot, shown) if task else {}
    if as_json:
        print(json.dumps({"model": str(model), "texts": measured, "tasks": found}, indent=1))
        return
    console = Console()
    if measured:
        console.print(_bits_table(measured))
    if found:
        console.print(_task_table(found))
    console.print("Not for clinical use.", style="dim")


def _named(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    return (name, Path(file)) if equals and not Path(text).exists() else (Path(text).stem, Path(text))


def _check(files: list[tuple[str, Path]], tasks: list[str], include: Path | None) -> None:
    """What can be known before torch is imported."""
    if not files and not tasks:
        raise InputError("nothing to measure: want files of documents, or --task NAME")
    names = [name for name, _ in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two texts are called {twice}: want a name before each, such as new={files[-1][1]}")
    for name, path in files:
        if path.suffix not in (".jsonl", ".parquet"):
            raise InputError(f"{name}: {path} has the ending {path.suffix!r}: want .jsonl or .parquet")
        if not path.is_file():
            raise InputError(f"{name}: {path} does not exist: want a file of documents")
    if include and not include.is_dir():
        raise InputError(f"--include {include} is no folder: want one with YAML files of tasks")


def _check_used(files: list[tuple[str, Path]], tasks: list[str], removals: bool, max_tokens: int | None,
                of_tasks: dict[str, Any]) -> None:  # fmt: skip
    """That no option is given which would change nothing, and what tasks need is there."""
    if not tasks and (useless := next((name for name, value in of_tasks.items() if value is not None), None)):
        raise InputError(f"--{useless} is given without --task: want a task, or it left out")
    if not files and (removals or max_tokens):
        raise InputError(f"--{'removals' if removals else 'max-tokens'} is given without texts: want a file of "
                         "documents, or it left out")
    if tasks and find_spec("lm_eval") is None:
        raise InputError("--task wants the package lm-eval, which is not installed: pip install 'polyclinic[eval]'")


def _subsets(loaded: "ModelFolder", owners: list[str] | None, removals: bool) -> dict[str, list[str] | None]:
    """Owners to route to, by what that is called; None for a model that has none."""
    if owners is None and not loaded.owners and not removals:
        return {"the model": None}
    present = list(loaded.owners) if owners is None else owners
    loaded.use(present)  # which refuses what it does not have
    subsets = {"all owners" if owners is None else " and ".join(present) or ANCHOR: present}
    if removals:
        subsets |= {f"without {owner}": [other for other in present if other != owner] for owner in present}
        subsets[ANCHOR] = []
    return subsets


def _bits(loaded: "ModelFolder", files: list[tuple[str, Path]], subsets: dict[str, list[str] | None],
          max_tokens: int | None, shown: Progress) -> dict[str, dict[str, Any]]:
    from moe.data import shards, sources
    from moe.eval.bits import count_bits

    measured: dict[str, dict[str, Any]] = {}
    with written(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as scratch:
        for name, path in files:
            folder = Path(scratch, str(len(measured)))
            documents = iter(sources.documents(path))
            if (first := next(documents, None)) is None:
                raise InputError(f"{name}: {path} has no documents: want at least one")
            counts = shards.write(folder, chain([first], documents), loaded.tokenizer, special=loaded.special)
            packed = shards.PackedDocuments(folder)
            total = min(counts["tokens"], max_tokens or counts["tokens"]) * len(subsets)
            task = shown.add_task(f"{name}: tokens", total=total)
            found: dict[str, Any] = {"bytes": 0, "bpb": {}}

            def advance(output: Any, task: Any = task) -> None:
                shown.advance(task, len(output.hidden_TD))

            for who, owners in subsets.items():
                if owners is not None:
                    loaded.use(owners)
                bits = count_bits(loaded.decoder, packed, max_tokens, advance)
                found["bytes"], found["bpb"][who] = bits.num_bytes, bits.per_byte
            measured[name] = found
    if loaded.owners:
        loaded.use(next(iter(subsets.values())))
    return measured


def _tasks(loaded: "ModelFolder", tasks: list[str], include: Path | None, limit: int | None, fewshot: int | None,
           shown: Progress) -> dict[str, dict[str, Any]]:
    from moe.eval.harness import HarnessModel, run_tasks  # lm-eval takes seconds to import

    bar = shown.add_task("requests", total=None)
    model = HarnessModel(loaded, observe=lambda done, total: shown.update(bar, completed=done, total=total))
    return run_tasks(model, tasks, include, limit, fewshot)


def _bits_table(measured: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="bits per byte, lower is better")
    table.add_column("text")
    for name in measured:
        table.add_column(name, justify="right")
    table.add_row("bytes", *(f"{found['bytes']:,}" for found in measured.values()), end_section=True)
    for who in next(iter(measured.values()))["bpb"]:
        table.add_row(who, *(f"{found['bpb'][who]:.4f}" for found in measured.values()))
    return table


def _task_table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    for heading, justify in (("task", "left"), ("metric", "left"), ("value", "right"), ("standard error", "right")):
        table.add_column(heading, justify=justify)
    for task, metrics in found.items():
        for name, value in metrics.items():
            metric, _, rule = name.partition(",")
            if not rule or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{rule}")
            table.add_row(task, metric if rule == "none" else f"{metric} ({rule})", f"{value:.4f}",
                          "" if error is None else f"{error:.4f}")
    return table
