"""Checkpoints: one logical tensor for each trained parameter, moment and buffer, whole on disk or absent.

They do not depend on how many ranks wrote them or how these shared the state, are written while training goes on, and
are verified before they are loaded; nothing is unpickled. Frozen weights are not in them: they belong to the anchor,
whose hash is part of the job's identity. Random state is not in them either, because training keeps none: what is
drawn is drawn from counters (seed, step, rank, micro-batch), never from torch's generators.

Read files (what lies on the disk), plan (who writes what), gather (how it gets there), save and pace, restore in this
order.
"""

from moe.train.checkpoint.files import (
    Checkpoint,
    Damage,
    DamagedCheckpoint,
    State,
    newest,
    open_checkpoint,
    step_folders,
)
from moe.train.checkpoint.restore import restore
from moe.train.checkpoint.save import KEEP, SaveFailed, Saver

__all__ = [
    "KEEP",
    "Checkpoint",
    "Damage",
    "DamagedCheckpoint",
    "SaveFailed",
    "Saver",
    "State",
    "newest",
    "open_checkpoint",
    "restore",
    "step_folders",
]
