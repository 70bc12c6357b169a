"""What runs in the cluster's processes: a rank of a training job, a domain's data, a domain's measurement.

Each imports what it needs when it runs: torch alone takes seconds, and preparing text needs none.
"""

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import ray

from launch.board import Reporter, Warnings, wait_for_job
from moe.config import PUBLIC, JobConfig
from moe.config_file import check
from moe.errors import InputError
from moe.run_folder import RunFolder

PEER_SECONDS = 1.0  # for which a rank that has lost another keeps quiet


def train_rank(settings: dict[str, Any]) -> None:
    """One rank of a gang. Everything that needs no inputs is done before they exist."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from kernels import backend
    from moe.job.train import train_job
    from moe.specialty import stages
    from moe.train import preemption
    from moe.train.engine import connect
    from moe.train.watchdog import Watchdog

    if not torch.cuda.is_available():
        torch.set_num_threads(settings["threads"])
    connect()
    stage, attempt, board = settings["stage"], settings["attempt"], settings["board"]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ray.get(board.arrive.remote(stage, attempt, rank, ray.get_runtime_context().get_node_id()))
    logging.getLogger("moe.train.checkpoint").addHandler(Warnings(board, stage))
    if (job := wait_for_job(board, stage, attempt, preempted(rank))) is None:
        return
    config, run, report = check(job["config"]), RunFolder(Path(job["run"])), Reporter(board, stage, attempt)
    backend.force(config.run.backend)
    try:
        with Watchdog(run.stage(stage) / "ranks", rank, world_size, config.cluster.hang_seconds) as watchdog:
            given = (job["identity"], get_device(), report, watchdog.beat)
            if isinstance(config, JobConfig):
                finished = train_job(config, run, *given)
            elif stage == "anchor":
                finished = stages.train_anchor(config, run, *given)
            else:
                finished = stages.train_pack(config, run, job["owner"], *given)
    except InputError as error:
        ray.get(board.end.remote(stage, attempt, f"refused: {error}"))
        raise  # or the other ranks would wait for this one
    except RuntimeError:
        # Where this rank has only lost another one, that one's end is to be seen first: it is the story.
        time.sleep(PEER_SECONDS * (world_size > 1))
        raise
    ending = "finished" if finished else preempted(rank) if preemption.noticed() else "stopped"
    ray.get(board.end.remote(stage, attempt, ending))


def preempted(rank: int) -> str:
    return f"preempted: rank {rank} on {socket.gethostname()}"


@ray.remote(num_cpus=0, max_calls=1)
def prepare_domain(config: dict[str, Any], run: RunFolder, domain: str) -> dict[str, Any]:
    """In a process of its own that ends with it, so that the priority it gives up is not missed by the next; and
    without a claim on a CPU, all of which may be held by the anchor's workers, who wait for it."""
    from moe.data.prepare import prepare

    if domain != PUBLIC:
        os.nice(10)  # owners' text is made while the anchor trains, and is not to slow it
    return prepare(check(config), run, domain)


@ray.remote(num_cpus=1)
def merge_packs(run: RunFolder, owners: list[str]) -> dict[str, Any]:
    from moe.hf import folder
    from moe.specialty.merge import merge
    from moe.specialty.pack import Pack

    merged = merge(folder.load(run.anchor), [Pack.load(run.pack(owner)) for owner in owners])
    folder.save(run.model, merged)
    return {"anchor_hash": merged.anchor_hash, "model_hash": merged.identity(), "slots": merged.owners}


@ray.remote(num_cpus=1)
def measure_domain(config: dict[str, Any], run: RunFolder, domain: str) -> dict[str, Any]:
    import torch

    from kernels import backend
    from moe.specialty import measure

    torch.set_num_threads(1)  # sums in one order, whatever the machine
    checked = check(config)
    if checked.run.backend not in ("triton", "megablocks"):  # which are for training: measured is on a CPU
        backend.force(checked.run.backend)
    return measure.measure_domain(checked, run, domain)
