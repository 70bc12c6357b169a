"""The stages of a specialty run, and how each is put on the cluster.

    data-public ──► anchor ──┬──► pack-OWNER ──┬──► merge ──► measure-DOMAIN
         └────► data-OWNER ──┘  (side by side) ┘
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from launch.board import Board
from launch.graph import Outputs, Stage, Stopped
from launch.session import Capacity
from launch.worker import measure_domain, merge_packs, prepare_domain, train_rank
from moe.config import PUBLIC, DataConfig, SpecialtyConfig
from moe.errors import InputError
from moe.hf.folder import load as load_model
from moe.run_folder import RunFolder
from moe.specialty.pack import Pack


class SpecialtyRun:
    """Builds the stages of one run on a connected cluster."""

    def __init__(self, config: SpecialtyConfig, run: RunFolder, capacity: Capacity):
        # Ray's processes have working directories of their own.
        self.config, self.run, self.capacity = config, RunFolder(run.path.resolve()), capacity
        self.board = Board.remote()
        self._values = config.with_absolute_paths().model_dump(mode="json")
        self._room = Room(capacity.workers)
        self._stopping = threading.Event()
        self._fits: dict[str, Future] = {}

    def stages(self) -> list[Stage]:
        config, run, owners = self.config, self.run, list(self.config.owners)
        seed, backend = config.run.seed, config.run.backend
        common = {"seed": seed, "precision": config.run.precision, "backend": backend, "deepspeed": config.deepspeed}
        stages = [
            Stage(
                f"data-{PUBLIC}",
                settings=[_content(config.public), config.tokenizer.vocab_size, seed],
                run=lambda _: self._task(prepare_domain, PUBLIC),
                makes=(run.tokenizer, *(run.shards(PUBLIC, split) for split in ("train", "calibration", "eval"))),
            ),
            Stage(
                "anchor",
                settings=[config.model.model_dump(mode="json"), config.anchor.model_dump(mode="json"), common],
                run=self._train_anchor,
                needs=(f"data-{PUBLIC}",),
                makes=(run.anchor,),
                prepare=lambda: self._launch("anchor", config.cluster.anchor_workers),
                abandon=lambda: self._post("anchor", None),
            ),
        ]
        stages += [
            Stage(
                f"data-{owner}",
                settings=[_content(config.owners[owner].data), seed],
                run=lambda _, owner=owner: self._task(prepare_domain, owner),
                needs=(f"data-{PUBLIC}",),
                makes=(run.shards(owner, "train"), run.shards(owner, "eval")),
            )
            for owner in owners
        ]
        pack_settings = [config.pack.model_dump(mode="json"), config.calibration.model_dump(mode="json"), common]
        stages += [
            Stage(
                f"pack-{owner}",
                settings=[config.owners[owner].slot, pack_settings],
                run=lambda inputs, owner=owner: self._train_pack(owner, inputs),
                needs=("anchor", f"data-{PUBLIC}", f"data-{owner}"),
                makes=(run.pack(owner),),
            )
            for owner in owners
        ]
        stages.append(
            Stage(
                "merge",
                settings=None,
                run=lambda _: ray.get(merge_packs.remote(run, owners)),
                needs=tuple(f"pack-{owner}" for owner in owners),
                makes=(run.model,),
            )
        )
        stages += [
            Stage(
                f"measure-{domain}",
                settings=[config.evaluation.model_dump(mode="json"), backend],
                run=lambda _, domain=domain: self._task(measure_domain, domain),
                needs=("merge", f"data-{domain}"),
            )
            for domain in (PUBLIC, *owners)
        ]
        return stages

    def steps(self) -> dict[str, int]:
        """Updates of each training stage."""
        packs = {f"pack-{owner}": self.config.pack.train.steps for owner in self.config.owners}
        return {"anchor": self.config.anchor.steps, **packs}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The newest metrics of each training stage."""
        return ray.get(self.board.rows.remote())

    def stop(self) -> None:
        """Ask all training stages to stop at a checkpoint."""
        self._stopping.set()
        ray.get(self.board.stop.remote())

    def _task(self, function: Any, domain: str) -> Outputs:
        return ray.get(function.remote(self._values, self.run, domain))

    def _train_anchor(self, inputs: str) -> Outputs:
        self._launch("anchor", self.config.cluster.anchor_workers)
        self._train("anchor", {"identity": inputs})
        return {"anchor_hash": load_model(self.run.anchor).identity()}

    def _train_pack(self, owner: str, inputs: str) -> Outputs:
        stage = f"pack-{owner}"
        self._launch(stage, self.config.cluster.owner_workers)
        self._train(stage, {"identity": inputs, "owner": owner})
        pack = Pack.load(self.run.pack(owner))
        return {"slot": pack.slot, "anchor_hash": pack.anchor_hash, "tensors": pack.hashes()}

    def _train(self, stage: str, job: dict[str, Any]) -> None:
        """Give the workers their job and wait for them. Raises Stopped where they stopped at a checkpoint, InputError
        where one found its input wrong, whatever became of the others then."""
        self._post(stage, {"config": self._values, "run": str(self.run.path), **job})
        failure = self._fits[stage].exception()
        ending = ray.get(self.board.ending.remote(stage))
        if ending.startswith("refused: "):
            raise InputError(ending.removeprefix("refused: "))
        if failure:
            raise failure
        if ending == "stopped":
            raise Stopped

    def _post(self, stage: str, job: dict[str, Any] | None) -> None:
        ray.get(self.board.post.remote(stage, job))

    def _launch(self, stage: str, workers: int) -> None:
        """Start a Ray Train job's processes, once; they wait on the board for their job."""
        if stage in self._fits:
            return
        self._fits[stage] = future = Future()

        def fit() -> None:
            try:
                with self._room.take(workers):
                    if self._stopping.is_set():
                        raise Stopped
                    future.set_result(self._trainer(stage, workers).fit())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=fit, name=f"fit {stage}", daemon=True).start()

    def _trainer(self, stage: str, workers: int) -> TorchTrainer:
        gpu = self.capacity.use_gpu
        jobs = 1 if stage == "anchor" else len(self.config.owners)
        threads = max(1, len(os.sched_getaffinity(0)) // (workers * jobs)) if self.capacity.local else 1
        return TorchTrainer(
            train_rank,
            train_loop_config={"stage": stage, "board": self.board, "threads": threads},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": 1, "GPU": 1} if gpu else {"CPU": 1}
            ),
            run_config=RunConfig(
                # Ray continues a run whose name it knows; ours continue from our own checkpoints.
                name=f"{stage}-{time.time_ns()}",
                storage_path=str(self.run.ray.resolve()),
                failure_config=FailureConfig(max_failures=self.config.cluster.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )


def _content(data: DataConfig) -> list[Any]:
    """What a domain's text depends on: its config, and whether its files have changed since."""
    files = [path.stat() for path in (*data.documents, *data.held_out)]
    return [data.model_dump(mode="json"), [[file.st_size, file.st_mtime_ns] for file in files]]


class Room:
    """So many workers fit; a job waits until there is room for all of its own."""

    def __init__(self, workers: int):
        self._free = workers
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, workers: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= workers)
            self._free -= workers
        try:
            yield
        finally:
            with self._changed:
                self._free += workers
                self._changed.notify_all()
