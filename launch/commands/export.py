"""`polyclinic export`: a model folder of ours becomes one that transformers reads. Needs no cluster and no GPU."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.terminal import bar, say, written
from moe.errors import InputError


def export_model(
    folder: Annotated[Path, typer.Argument(help="A model's folder, such as runs/quickstart/model.")],
    out: Annotated[Path, typer.Argument(help="What transformers will read; must not exist.")],
    family: Annotated[str, typer.Option(
        "--as", help="auto: the plain family that expresses the model exactly, else our own architecture; or one of "
        "llama, mixtral, qwen3, qwen3_moe, olmo2, olmoe, flex_olmo, glm4_moe, polyclinic; or dmoe, the mixture layers "
        "as MegaBlocks keeps them.")] = "auto",
    precision: Annotated[str | None, typer.Option(
        help="Of the weights: float32, bfloat16, float16, float64; as they are where it is left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print export.json, for scripts.")] = False,
) -> None:
    """Write FOLDER for transformers, with an account of every tensor in export.json and a card in README.md.

    Example: polyclinic export runs/quickstart/model exported --precision bfloat16
    """
    from moe.hf import dmoe
    from moe.hf.account import EXPORTED
    from moe.hf.exporting import export_folder

    if family == dmoe.NAME and precision is not None:
        raise InputError(f"--precision {precision}: want it left out with --as {family}, which moves weights as they "
                         "are")

    with written(out), bar() as shown:
        task = shown.add_task(f"{folder.name}: tensors", total=None)

        def progress(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total)

        if family == dmoe.NAME:
            account = dmoe.export_dmoe(folder, out, progress)
        else:
            account = export_folder(folder, out, family, precision, progress=progress)
    if as_json:
        print(json.dumps(account, indent=1))
        return
    left_out = sum("left_out" in tensor for tensor in account["sources"].values())
    say(f"{out}: {len(account['targets'])} tensors of {account['family']} out of {len(account['sources'])} of ours, of "
        f"which {left_out} are left out; each with its hash in {EXPORTED}")
