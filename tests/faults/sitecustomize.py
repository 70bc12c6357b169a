"""Put on the path of a run's processes: a rank hangs where a file asks it to.

The file $FAULTS/hang-N lets rank N sleep at its next loss, once; $FAULTS/spin-N lets it stay in C code there instead,
holding the interpreter's lock.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path

FAULTY = "moe.train.objective"


def inject(objective):
    next_token, folder = objective.next_token, Path(os.environ["FAULTS"])

    def faulty(*arguments, **named):
        rank = os.environ.get("RANK")
        if (asked := folder / f"hang-{rank}").exists():
            asked.unlink()
            time.sleep(3600)
        if (asked := folder / f"spin-{rank}").exists():
            asked.unlink()
            sum(range(10**13))
        return next_token(*arguments, **named)

    objective.next_token = faulty


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != FAULTY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), inject(module))
        return spec


if "FAULTS" in os.environ:
    sys.meta_path.insert(0, Finder())
