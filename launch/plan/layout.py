"""How an update is laid out over ranks: what a mesh, a batch and an engine's stage mean for memory and traffic."""

from dataclasses import dataclass
from typing import Any

from moe.config import JobConfig, TrainConfig
from moe.errors import InputError

BUCKET = 500_000_000  # elements of gradients that are reduced as one: DeepSpeed's default


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
    bucket: int = BUCKET

    @classmethod
    def of(cls, train: TrainConfig, context: int, workers: int, deepspeed: dict[str, Any], precision: str,
           expert: int = 1, chunks: int = 1) -> "Layout":
        """Raises InputError for a bucket that is none."""
        half = precision != "float32"
        overlap, all_reduce = setting(deepspeed, "overlap_comm"), setting(deepspeed, "use_multi_rank_bucket_allreduce")
        return cls(
            workers, train.micro_batch_size, train.gradient_accumulation(workers), context, expert, train.zero_stage,
            float(train.recompute_layers), chunks,
            # DeepSpeed 0.19.8: on by itself in stage 3 only.
            overlap=train.zero_stage == 3 if overlap is None else bool(overlap),
            # and in stages 1 and 2 its buckets hold the shares of several ranks, which an all-reduce serves.
            all_reduce=train.zero_stage < 3 and all_reduce is not False,
            weight_bytes=2 if half else 4, moments=2 if train.optimizer == "adamw" else 0, bucket=_bucket(deepspeed))

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


def setting(deepspeed: dict[str, Any], *keys: str) -> Any:
    """What lies below `zero_optimization` of a `deepspeed:` section; None where nothing does, or null."""
    found: Any = deepspeed
    for key in ("zero_optimization", *keys):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _bucket(deepspeed: dict[str, Any]) -> int:
    found = setting(deepspeed, "reduce_bucket_size")
    if found is None:
        return BUCKET
    if isinstance(found, bool) or not isinstance(found, int | float) or found < 1:
        raise InputError(f"deepspeed.zero_optimization.reduce_bucket_size={found!r}: want a number of elements, such "
                         f"as {BUCKET // 10}")
    return int(found)
