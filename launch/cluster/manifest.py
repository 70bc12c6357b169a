"""What the manifests for Kubernetes and for Ray's launcher share: the script that trains on a Ray cluster, and YAML in
which a script can be read.
"""

from pathlib import PurePosixPath
from typing import Any

import yaml

from launch.cluster.request import Request
from launch.cluster.shell import assignments, body
from moe.errors import InputError


def train_script(request: Request, config: str, setup: tuple[str, ...] = (), failed: str = "") -> str:
    """For the head of a Ray cluster, where the config's text is in the file `config`, a word of the shell. `failed` is
    a file by which a start after one that has failed for good knows of it."""
    nodes = request.nodes
    variables = {
        "folder": request.config.run.path,
        "failed": failed,
        "chdir": request.chdir,
        "nodes": nodes.count,
        "workers": nodes.workers,
        "gpu": 1 if nodes.gpu else "",
        "wait_seconds": request.wait_seconds,
    }
    first = ["#!/usr/bin/env bash", "set -euo pipefail", *setup, f"config={config}", *assignments(variables)]
    return "\n".join(first) + "\n" + body("train.sh")


def check_shared(request: Request, storage: str, what: str) -> None:
    """Raise InputError where the run's folder would not be on the storage that outlives machines."""
    folder = PurePosixPath(request.chdir) / request.config.run.path
    if not folder.is_relative_to(storage) or ".." in folder.parts:
        raise InputError(f"run.folder={request.config.run.folder}: want it under {storage}, {what}, because a run that "
                         "goes on on other machines finds nothing anywhere else")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(*documents: dict[str, Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=10000, explicit_start=len(documents) > 1)
