"""How an update is laid out over ranks: what a mesh, a batch and an engine's stage mean for memory and traffic."""

from dataclasses import dataclass
from typing import Any

from moe.config import JobConfig, TrainConfig


@dataclass(frozen=True)
class Layout:
    workers: int
    micro_batch: int  # sequences of a rank at once
    accumulation: int  # micro-batches of an update
    context: int  # tokens of a sequence
    expert: int = 1  # ranks over which experts are spread
    zero_stage: int = 1
    recompute: float = 0.0  # share of the layers' forward that is computed again: 0 or 1
    chunks: int = 1  # of the exchange
    overlap: bool = False  # gradients travel while the backward goes on
    all_reduce: bool = True  # gradients are summed everywhere before each rank keeps its share
    gradient_bytes: int = 4  # of one element, on its way
    weight_bytes: int = 2  # of one element, in the model that computes
    moments: int = 2  # float32 values that the optimizer keeps of a parameter

    @classmethod
    def of(cls, train: TrainConfig, context: int, workers: int, deepspeed: dict[str, Any], precision: str,
           expert: int = 1, chunks: int = 1) -> "Layout":
        half, zero = precision != "float32", deepspeed.get("zero_optimization", {})
        return cls(
            workers, train.micro_batch_size, train.gradient_accumulation(workers), context, expert, train.zero_stage,
            float(train.recompute_layers), chunks,
            # DeepSpeed 0.19.8: on by itself in stage 3 only.
            overlap=zero.get("overlap_comm", train.zero_stage == 3),
            # and in stages 1 and 2 its buckets hold the shares of several ranks, which an all-reduce serves.
            all_reduce=train.zero_stage < 3 and zero.get("use_multi_rank_bucket_allreduce", True),
            weight_bytes=2 if half else 4, moments=2 if train.optimizer == "adamw" else 0)

    @classmethod
    def of_job(cls, config: JobConfig) -> "Layout":
        return cls.of(config.train, config.model.context_length, config.cluster.workers, config.deepspeed,
                      config.run.precision, config.parallel.expert, config.parallel.exchange_chunks)

    @property
    def tokens(self) -> int:
        """Of a rank's micro-batch."""
        return self.micro_batch * self.context

    @property
    def batch_tokens(self) -> int:
        """Of an update, of all ranks."""
        return self.tokens * self.accumulation * self.workers
