"""`polyclinic import`: a checkpoint of another family becomes a model folder of ours. Needs no cluster and no GPU."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.terminal import bar, say, written


def import_model(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder, a GGUF file, or what export --as dmoe wrote.")],
    out: Annotated[Path, typer.Argument(help="The model's folder; must not exist.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print import.json, for scripts.")] = False,
) -> None:
    """Write SOURCE as a model folder of ours, tensor by tensor, with an account of every one in its import.json.

    Example: polyclinic import downloads/SmolLM2-135M models/smollm2
    """
    from moe.hf import dmoe
    from moe.hf.account import IMPORTED
    from moe.hf.gguf import import_gguf
    from moe.hf.importing import import_folder

    with written(out), bar() as shown:
        task = shown.add_task(f"{source.name}: tensors", total=None)
        read = import_gguf if source.is_file() else dmoe.import_dmoe if dmoe.is_dmoe(source) else import_folder
        account = read(source, out, progress=lambda done, total: shown.update(task, completed=done, total=total))
    if as_json:
        print(json.dumps(account, indent=1))
        return
    sources = account["sources"]
    left_out = [name for name, tensor in sources.items() if "left_out" in tensor]
    changed = sum(not tensor.get("as_exported", True) for tensor in sources.values())
    since = f"; not what was exported: {changed}" if account["family"] == dmoe.NAME else ""
    say(f"{out}: {len(account['targets'])} tensors out of {len(sources)} of {account['family']}; left out: "
        f"{', '.join(left_out) or 'none'}{since}; each with its hash in {IMPORTED}")
