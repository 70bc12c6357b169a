"""One attempt of a gang as a Ray Train job: each worker on the node that it has been given."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import NODE_ID_LABEL_KEY

from moe.train import preemption
from moe.train.watchdog import collective_seconds


class _GangBackend(TorchConfig().backend_cls):
    """What Ray does in the main thread of each worker before and after the training, which has a thread of its own."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(preemption.watch)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Nothing: the processes end now, and leaving the process group in order would wait for a rank that hangs."""


@dataclass
class GangTorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type:
        return _GangBackend


def fit(
    train_rank: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    nodes: Sequence[str],
    *,
    name: str,
    folder: Path,
    use_gpu: bool,
    hang_seconds: float,
) -> None:
    """Run `train_rank(settings)` to its end in a worker on each of `nodes`, which are ids, those of one node together:
    Ray numbers the ranks node by node. Raises Ray's error of the first worker that fails, or of a node that is gone or
    full.

    Nothing is tried again: that is for the gang to decide, who knows which sizes are left."""
    TorchTrainer(
        train_rank,
        train_loop_config=settings,
        torch_config=GangTorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=collective_seconds(hang_seconds)
        ),
        scaling_config=ScalingConfig(
            num_workers=len(nodes),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1},
            label_selector=[{NODE_ID_LABEL_KEY: node} for node in nodes],  # Ray labels each node with its id
        ),
        run_config=RunConfig(
            # Ray continues a run whose name it knows; ours continue from our own checkpoints.
            name=f"{name}-{time.time_ns()}",
            storage_path=str(folder.resolve()),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    ).fit()
