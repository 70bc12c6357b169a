"""What a stage's folder says of it, so that a finished stage is not run again and a stopped one goes on.

    INPUTS   hash of the stage's settings and of the outputs of the stages it needs: what lies in the folder is of these
    SPENT    seconds of all its runs so far
    DONE     when it is finished: the same hash, its outputs, its seconds
"""

import contextlib
import glob
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe.manifest import value_hash
from moe.whole import write_whole

Outputs = dict[str, Any]  # plain values

log = logging.getLogger(__name__)


def inputs_hash(name: str, settings: Any, needed: Mapping[str, Outputs]) -> str:
    """Of everything that determines what a stage makes: plain values, and the outputs of the stages it needs."""
    return value_hash([name, settings, dict(needed)])


def run(folder: Path, inputs: str, work: Callable[[], Outputs], tell: Callable[[float], None]) -> Outputs:
    """Do a stage's work in its folder, which loses first what is of other inputs. `tell` hears the seconds spent,
    however the work ends."""
    own(folder, inputs)
    (folder / "DONE").unlink(missing_ok=True)  # of a stage that is done again: it would speak of files that are not its
    started = time.time()
    earlier = _read(folder / "SPENT") or 0.0  # seconds of runs that were stopped
    try:
        outputs = work()
    finally:
        seconds = earlier + time.time() - started
        tell(seconds)
        with contextlib.suppress(OSError):  # on a full disk: what ended the work is the story
            _write(folder / "SPENT", seconds)
    _write(folder / "DONE", {"inputs": inputs, "outputs": outputs, "seconds": seconds})
    return outputs


def own(folder: Path, inputs: str) -> None:
    """Keep what an interrupted run of the same inputs has left, and nothing else.

    Checkpoints of other inputs may be weeks of work: with their folder they are moved aside, not deleted, and come back
    when these are the inputs once more."""
    if (before := _read(folder / "INPUTS")) == inputs:
        return
    aside = None
    if any(folder.glob("checkpoints/step-*")):
        aside = _free(folder.with_name(f"{folder.name}.of-{str(before)[:12]}"))
        os.replace(folder, aside)
    shutil.rmtree(folder, ignore_errors=True)
    if back := _aside(folder, inputs):
        os.replace(back, folder)
    else:
        folder.mkdir(parents=True)
        _write(folder / "INPUTS", inputs)
    if aside or back:
        log.warning("what determines %s has changed: %s%s", folder,
                    f"it goes on with the checkpoints that lay in {back}" if back else "it begins anew",
                    f"; its checkpoints are now in {aside}" if aside else "")


def _free(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _aside(folder: Path, inputs: str) -> Path | None:
    """The folder of these inputs that was moved aside; None where there is none."""
    moved = sorted(folder.parent.glob(f"{glob.escape(folder.name)}.of-*"))
    return next((path for path in moved if _read(path / "INPUTS") == inputs), None)


def done(folder: Path) -> dict[str, Any] | None:
    """What DONE says; None where there is none, or none that a stage has written."""
    mark = _read(folder / "DONE")
    return mark if isinstance(mark, dict) and mark.keys() == {"inputs", "outputs", "seconds"} else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1))
