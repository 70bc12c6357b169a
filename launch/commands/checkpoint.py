"""`polyclinic checkpoint`: look at what training has saved, and make models of it. Needs no cluster and no GPU."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import DownloadColumn
from rich.table import Table

from launch.commands.terminal import bar, say, written
from launch.graph import RunFailed
from moe.errors import InputError

if TYPE_CHECKING:
    from moe.config import ModelConfig
    from moe.train.checkpoint import Checkpoint, Damage  # which load torch: a typo is answered before

app = typer.Typer(no_args_is_help=True, help="Verify, inspect and convert what training has saved.\n\n"
                                             "Example: polyclinic checkpoint verify runs/quickstart")

MOMENTS = ("exp_avg", "exp_avg_sq")  # a tensor called NAME.MOMENT is the optimizer's
Where = Annotated[Path, typer.Argument(help="A checkpoint, a folder of them, or a run, such as runs/quickstart.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def verify(path: Where, as_json: AsJson = False) -> None:
    """Read every checkpoint under PATH, or the model that `polyclinic import` or `export` has written there, and
    compare each tensor with its hash.

    Exit status: 0 where all are whole, 1 where one is damaged, 2 where there is none.

    Examples: polyclinic checkpoint verify runs/quickstart; polyclinic checkpoint verify models/smollm2
    """
    from moe.hf import account

    model = account.find(path) is not None
    rows = [_verify_model(path)] if model else [_verify(folder) for folder in find(path)]
    damaged = [row for row in rows if not row["whole"]]
    if as_json:
        print(json.dumps({"whole": not damaged, "checkpoints": rows}, indent=1))
    else:
        for row in rows:
            say(f"{row['path']}: " + (f"whole, {row['tensors']} tensors, {_size(row['bytes'])}" if row["whole"] else
                                       "DAMAGED"))  # fmt: skip
            for damage in row["damages"]:
                say(f"  {damage['problem']}")
    if damaged and model:
        raise RunFailed(f"{path} is not as it was written; import or export it again")
    if damaged:
        raise RunFailed(f"{len(damaged)} of {len(rows)} checkpoints cannot be used; a run goes on from the newest of "
                        "the others")


def _verify(folder: Path) -> dict[str, Any]:
    """What is said of a checkpoint."""
    from moe.train.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(folder)
    except InputError as error:
        return _row(folder, [{"file": None, "tensor": None, "problem": str(error)}])
    damages = [damage._asdict() | {"problem": str(damage)} for damage in _verified(checkpoint)]
    return _row(folder, damages, len(checkpoint.names), _num_bytes(checkpoint))


def _verify_model(folder: Path) -> dict[str, Any]:
    from moe.hf.account import verify
    from moe.hf.source import weight_files

    try:
        with bar() as progress:
            task = progress.add_task(folder.name)
            count = verify(folder, lambda done, total: progress.update(task, completed=done, total=total))
        return _row(folder, [], count, sum(file.stat().st_size for file in weight_files(folder)))
    except InputError as error:
        return _row(folder, [{"file": None, "tensor": None, "problem": str(error)}])


def _row(folder: Path, damages: list[dict[str, Any]], tensors: int = 0, num_bytes: int = 0) -> dict[str, Any]:
    return {"path": str(folder), "whole": not damages, "tensors": tensors, "bytes": num_bytes, "damages": damages}


@app.command()
def inspect(
    path: Where,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the newest checkpoint under PATH holds, and what wrote it. Its tensors are not verified.

    Example: polyclinic checkpoint inspect runs/quickstart/stages/anchor/checkpoints
    """
    checkpoint = _newest(path)
    manifest = checkpoint.manifest
    facts = {
        "path": str(checkpoint.path),
        **vars(checkpoint.state),
        **{key: manifest[key] for key in ("world_size", "identity", "versions", "description")},
        "parameters": sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names if not _moment(name)),
        "bytes": _num_bytes(checkpoint),
        "shards": {file: shard["bytes"] for file, shard in manifest["shards"].items()},
        "kinds": _kinds(checkpoint),
    }
    if as_json:
        print(json.dumps(facts | ({"tensors": manifest["tensors"]} if tensors else {}), indent=1))
        return
    console = Console()
    summary = Table.grid(padding=(0, 2))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    for key, value in (
        ("checkpoint", facts["path"]),
        ("updates", f"{facts['step']:,} ({facts['skipped']:,} of them skipped)"),
        ("position", f"{facts['position']:,} sequences"),
        ("written by", f"{facts['world_size']} ranks, {versions}"),
        ("job", facts["identity"]),
        ("parameters", f"{facts['parameters']:,}, buffers included"),
        ("size", f"{_size(facts['bytes'])} in {len(facts['shards'])} shards"),
    ):
        summary.add_row(key, value)
    console.print(summary)
    table = Table()
    for heading in ("tensors", "shape"):
        table.add_column(heading, overflow="fold")
    for heading in ("count", "elements", "size"):
        table.add_column(heading, justify="right")
    for row in facts["kinds"]:
        table.add_row(row["name"], row["shape"], f"{row['count']:,}", f"{row['elements']:,}", _size(row["bytes"]))
    console.print(table)
    for name in checkpoint.names if tensors else ():
        record = manifest["tensors"][name]
        say(f"{name} {record['shape']} {record['shard']} {record['sha256']}")


@app.command()
def convert(
    path: Where,
    out: Annotated[Path, typer.Argument(help="The model's folder; must not exist.")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights; routers stay float32.")]
    = "float32",
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, where the run's is not at hand.")] = None,
) -> None:
    """Write the weights of the newest checkpoint under PATH as a model folder, which every other command reads.

    It is verified first.

    Example: polyclinic checkpoint convert runs/quickstart/stages/anchor/checkpoints anchor-model --dtype bfloat16
    """
    if out.exists():
        raise InputError(f"{out} exists: want a folder that does not")
    checkpoint = _newest(path)
    import torch

    from moe.data.tokenizer import fits, load, load_config
    from moe.hf import folder
    from moe.hf.from_checkpoint import model_of
    from moe.whole import whole_or_absent

    section, vocab_size = _described(checkpoint)
    file = tokenizer or _tokenizer_of_run(checkpoint.path)
    tokens = load(file)
    if not fits(tokens, vocab_size):
        raise InputError(f"tokenizer {file} has {tokens.get_vocab_size()} tokens: want the {vocab_size} of the model "
                         f"of checkpoint {checkpoint.path}")
    if damages := _verified(checkpoint):
        raise InputError(f"checkpoint {checkpoint.path} is damaged: {damages[0]}; want a whole one")
    with written(out), whole_or_absent(out) as partial:
        folder.write(partial, model_of(checkpoint, section, tokens, getattr(torch, dtype), load_config(file)))
    say(f"{out}: the model after {checkpoint.state.step} updates, in {dtype}")


def find(path: Path) -> list[Path]:
    """Every checkpoint under PATH, oldest first in each folder. Raises InputError where there is none."""
    from moe.train.checkpoint import step_folders
    from moe.train.checkpoint.files import MANIFEST, NAME

    if NAME.fullmatch(path.resolve().name) or (path / MANIFEST).is_file() and [*path.glob("shard-*")]:
        found = [path] if path.is_dir() else []
    else:
        folders = [path, path / "checkpoints", *sorted(path.glob("stages/*/checkpoints"))]
        found = [step for folder in folders for step in reversed(step_folders(folder))]
    if not found:
        raise InputError(f"{path} holds no checkpoint: want one, such as step-00000100, a folder of them, or a run")
    return found


def _newest(path: Path) -> "Checkpoint":
    from moe.train.checkpoint import open_checkpoint

    found = find(path)
    folders = sorted({step.parent for step in found})
    if len(folders) > 1:
        raise InputError(f"{path} holds the checkpoints of {len(folders)} jobs: want one of "
                         f"{', '.join(map(str, folders))}")
    return open_checkpoint(found[-1])


def _described(checkpoint: "Checkpoint") -> "tuple[ModelConfig, int]":
    """The model's section and its vocabulary's size. Raises InputError where the checkpoint has not all of a model."""
    import torch
    from pydantic import ValidationError

    from moe.config import ModelConfig
    from moe.model import Decoder

    description = checkpoint.manifest["description"]
    try:
        section = ModelConfig.model_validate(description["model"])
        with torch.device("meta"):
            wanted = Decoder(section, description["vocab_size"], description["slots"]).state_dict()
    except (KeyError, ValidationError) as error:
        raise InputError(f"checkpoint {checkpoint.path} does not describe a model that this version knows: "
                         f"{str(error).splitlines()[0]}") from error
    frozen = [name for name in wanted if name not in checkpoint.names]
    if frozen:
        raise InputError(
            f"checkpoint {checkpoint.path} holds a part of its model only, because the rest, such as {frozen[0]}, was "
            "frozen: want the pack that its job writes at the end, in packs/ of its run"
        )
    return section, description["vocab_size"]


def _tokenizer_of_run(path: Path) -> Path:
    from moe.run_folder import RunFolder

    for folder in path.resolve().parents:
        run = RunFolder(folder)
        if run.config.is_file() and run.tokenizer.is_file():
            return run.tokenizer
    raise InputError(f"checkpoint {path} lies in no run that has a tokenizer: want it given by --tokenizer FILE")


def _verified(checkpoint: "Checkpoint") -> "list[Damage]":
    """What is wrong with it; shows how far it has come where somebody looks on."""
    with bar(DownloadColumn()) as progress:
        task = progress.add_task(checkpoint.path.name, total=_num_bytes(checkpoint))
        return checkpoint.verify(progress=lambda num_bytes: progress.advance(task, num_bytes))


def _num_bytes(checkpoint: "Checkpoint") -> int:
    return sum(map(checkpoint.num_bytes, checkpoint.names))


def _kinds(checkpoint: "Checkpoint") -> list[dict[str, Any]]:
    """Tensors that differ in their layer only are one row, and so is each of the optimizer's moments."""
    groups = defaultdict(list)
    for name in checkpoint.names:
        moment = _moment(name)
        groups[(bool(moment), f"*.{moment}" if moment else re.sub(r"\.\d+\.", ".*.", name))].append(name)
    rows = []
    for (_, kind), names in sorted(groups.items()):
        shapes = {" x ".join(map(str, checkpoint.shape(name))) for name in names}
        num_bytes = sum(map(checkpoint.num_bytes, names))
        rows.append({"name": kind, "shape": shapes.pop() if len(shapes) == 1 else "", "count": len(names),
                     "elements": sum(math.prod(checkpoint.shape(name)) for name in names), "bytes": num_bytes})
    return rows


def _moment(name: str) -> str | None:
    return next((moment for moment in MOMENTS if name.endswith(f".{moment}")), None)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.4g} TB"
