"""One step's numbers, from all micro-batches and ranks to whoever listens."""

import logging
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe.train import preemption
from moe.train.engine import Engine
from moe.train.flops import matmul_flops_per_s, training_flops_per_token
from moe.train.objective import LossParts
from moe.train.telemetry import Metrics

Report = Callable[[dict[str, Any]], bool]  # takes a row of metrics; True asks the job to stop at a checkpoint

log = logging.getLogger(__name__)


class Recorder:
    """Sums a step's losses over micro-batches and ranks, and tells metrics.jsonl and the reporter.

    Every rank has one and calls the same methods; `stop_requested` is the same on all of them."""

    def __init__(self, engine: Engine, metrics: Metrics | None, report: Report, tokens_per_step: int):
        """`metrics` and `report` are used on rank 0 only."""
        self.stop_requested = False
        self._engine, self._metrics, self._report = engine, metrics, report
        self._tokens_per_step = tokens_per_step
        dtype = next(engine.model.parameters()).dtype
        peak = matmul_flops_per_s(engine.device, dtype) * engine.world_size
        self._step_flops_share = tokens_per_step * training_flops_per_token(engine.model) / peak
        self.restart_clock()
        self._asked_to_stop = False
        self._alarm: str | None = None  # of the last row

    def restart_clock(self) -> None:
        """What was done since the last update is no part of the next one's time: evaluation, a save."""
        self._since = time.perf_counter()

    def start_step(self) -> None:
        self._learning_rate = self._engine.learning_rate()
        # nll, labels, z-loss, micro-batches, requests to stop: one exchange a step for all of them
        self._sums = torch.zeros(5, dtype=torch.float64, device=self._engine.device)

    def add(self, loss: LossParts) -> None:
        self._sums[:3] += torch.stack([loss.nll_sum, loss.num_labels, loss.z_loss])
        self._sums[3] += 1

    def end_step(self, step: int) -> dict[str, Any]:
        """The step's row, the same on all ranks but for what is timed. Every rank must call it."""
        self._sums[4] = self._asked_to_stop or preemption.noticed()
        dist.all_reduce(self._sums)
        nll, labels, z_loss, micro_batches, requests = self._sums.tolist()
        self.stop_requested = requests > 0
        now = time.perf_counter()
        seconds, self._since = now - self._since, now  # with the text's reading and the last row's telling
        return {
            "step": step,
            "world_size": self._engine.world_size,
            "loss": nll / labels,
            "z_loss": z_loss / micro_batches,
            "learning_rate": self._learning_rate,
            "gradient_norm": self._engine.gradient_norm(),
            "tokens_per_s": self._tokens_per_step / seconds,
            "mfu": self._step_flops_share / seconds,
            "peak_memory_bytes": _peak_memory_bytes(self._engine.device),
        }

    def log(self, row: dict[str, Any]) -> None:
        if self._engine.rank == 0:
            if (alarm := row.get("alarm")) and alarm != self._alarm:
                log.warning("update %d: %s", row["step"], alarm)
            self._alarm = alarm
            self._metrics.log(row)
            self._asked_to_stop = self._report(row)


def _peak_memory_bytes(device: torch.device) -> int:
    """Of this process: on the GPU what torch has held at most, on a CPU the largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
