"""A batch script for Slurm: options for sbatch and a few variables, and after them shell code that is always the same.

The job is sent SIGTERM some time before its end, stops at a checkpoint, and queues itself again; so does one that is
pre-empted, where the site's PreemptParameters have send_user_signal (else Slurm ends its processes all at once and
queues it again, and it goes on from the last checkpoint that it had written). One that has failed is not queued again.
"""

import shlex
import sys
from pathlib import Path
from typing import Literal

from launch.cluster.request import Request
from launch.cluster.shell import assignments, body
from moe.errors import InputError

SCRIPT = "job.sh"
LOGS = "logs"


def script(
    request: Request,
    runner: Literal["ray", "torchrun"],
    *,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    more: tuple[str, ...] = (),
) -> str:
    """The whole script. `more` are further options of sbatch, such as --constraint=h100."""
    for option in more:
        if not option.startswith("-") or "\n" in option:
            raise InputError(f"--sbatch {option!r}: want an option of sbatch, such as --sbatch=--constraint=h100")
    nodes = request.nodes
    options = {
        "job-name": request.config.run.name,
        "partition": partition,
        "account": account,
        "qos": qos,
        "nodes": nodes.count,
        "ntasks-per-node": 1,
        "gpus-per-node": nodes.gpus or None,
        "cpus-per-task": request.cpus,
        "mem": request.memory,
        "time": request.time,
        "signal": f"B:TERM@{request.grace}",
        "requeue": True,
        "no-kill": runner == "ray" and nodes.least < nodes.count,
        "open-mode": "append",
        "chdir": request.chdir,
        "output": str(request.folder / LOGS).replace("%", "%%") + "/%j.log",
    }
    lines = [f"#SBATCH {_option(name, value)}" for name, value in options.items() if value not in (None, False)]
    variables = {
        "config": request.config_file,
        "folder": request.config.run.path,
        "script": request.folder / SCRIPT,
        "logs": request.folder / LOGS,
        "nodes": nodes.count,
        "workers": nodes.workers,
        "gpus": nodes.gpus,
        "gpu": 1 if nodes.gpu else "",
        "cpus": request.cpus,
        "grace": request.grace,
        "wait_seconds": request.wait_seconds,
        "max_restarts": request.max_restarts,
    }
    return "\n".join([
        "#!/usr/bin/env bash",
        *lines,
        *(f"#SBATCH {option}" for option in more),
        "# shellcheck disable=SC2034,SC2329 # what one launcher does not use; functions that are called by their names",
        "",
        "set -eo pipefail",
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:\"$PATH\"",
        *request.setup,
        "set -u",
        *assignments(variables),
    ]) + "\n" + body("job.sh") + body(f"{runner}.sh")  # fmt: skip


def _option(name: str, value: object) -> str:
    if value is True:
        return f"--{name}"
    text = str(value)
    if '"' in text or "\n" in text:
        raise InputError(f"--{name}={text!r}: want it without quotes and line breaks, which sbatch cannot read")
    return f'--{name}="{text}"' if set(text) & set(" \t#'\\") else f"--{name}={text}"
