"""Put on the path of a run's processes: a rank does what a file of the folder $FAULTS asks it to.

    hang-N         rank N sleeps at its next loss, once
    spin-N         it stays in C code there instead, holding the interpreter's lock
    not-finite-N   as long as the file is there, rank N's losses are no numbers
    save-N         rank N stops in the middle of the next shard it writes, once, and says so in saving-N
"""

import dataclasses
import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path


def asked(what: str) -> Path | None:
    """The file that asks this rank for it."""
    file = Path(os.environ["FAULTS"]) / f"{what}-{os.environ.get('RANK')}"
    return file if file.exists() else None


def hurt_losses(objective):
    next_token = objective.next_token

    def faulty(*arguments, **named):
        if file := asked("hang"):
            file.unlink()
            time.sleep(3600)
        if file := asked("spin"):
            file.unlink()
            sum(range(10**13))
        loss = next_token(*arguments, **named)
        return dataclasses.replace(loss, total=loss.total * float("nan")) if asked("not-finite") else loss

    objective.next_token = faulty


def hurt_shards(files):
    write_shard = files.write_shard

    def faulty(path, tensors, pace):
        file = asked("save")
        written = write_shard(path, tensors, pace)
        if file:
            file.unlink()
            os.truncate(path, written["bytes"] // 2)
            file.with_name(f"saving-{os.environ['RANK']}").touch()
            time.sleep(3600)
        return written

    files.write_shard = faulty


def hurry(watch):
    """A test has no minute to wait for a job to be resized."""
    watch.RUN_SECONDS, watch.STARTS = 2.0, 0


FAULTY = {"launch.watch": hurry, "moe.train.objective": hurt_losses, "moe.train.checkpoint.files": hurt_shards}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in FAULTY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), FAULTY[name](module))
        return spec


if "FAULTS" in os.environ:
    sys.meta_path.insert(0, Finder())
