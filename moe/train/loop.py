"""The training loop. Everything it calls lives in a file of its own; this one says in which order."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe.config import TrackingConfig, TrainConfig
from moe.data.loader import Batch, Loader
from moe.hashing import seed_of
from moe.model import Decoder
from moe.train import checkpoint
from moe.train.engine import Engine
from moe.train.objective import next_token, token_weights
from moe.train.recorder import Recorder, Report
from moe.train.telemetry import Metrics
from moe.train.watchdog import Beat, no_watchdog


@dataclass(frozen=True)
class Job:
    """What the loop needs beside model and data; plain values only."""

    name: str  # as the terminal and wandb show it
    folder: Path  # of the stage: metrics.jsonl and checkpoints/
    identity: str  # hash of everything that determines the result; checkpoints of another job are not taken
    config: TrainConfig
    precision: str
    z_loss_weight: float
    seed: int  # of attention's dropout
    tracking: TrackingConfig
    deepspeed: dict[str, Any]


class NonFiniteLoss(RuntimeError):
    """The loss is not a number; the message names the step and the documents."""


def train(
    job: Job,
    model: Decoder,
    loader: Loader,
    held_out: Callable[[], float],
    report: Report,
    before_update: Callable[[int], None] = lambda step: None,
    beat: Beat = no_watchdog,
) -> bool:
    """Train to the last step, or to a checkpoint when `report` asks to stop; return whether it was finished.

    `held_out` gives bits per byte of held-out text; `before_update`, told the number of updates done, may set the
    model's buffers; `beat` tells a watchdog of progress. Every rank must call it, with its own part of the loader."""
    config = job.config
    model.recompute_layers = config.recompute_layers
    engine = Engine(model, config, job.precision, job.deepspeed)
    state = checkpoint.restore(job.folder / "checkpoints", engine, job.identity)
    loader.position = state.position
    metrics = Metrics(job.folder / "metrics.jsonl", state.step, job.tracking, job.name) if engine.rank == 0 else None
    accumulation = config.gradient_accumulation(engine.world_size)
    recorder = Recorder(engine, metrics, report, config.batch_size * model.config.context_length)

    while state.step < config.steps and not recorder.stop_requested:
        beat("preparation", state.step)
        recorder.start_step()
        before_update(state.step)
        for number, batch in enumerate(loader.micro_batches()):
            beat(f"micro-batch {number}")
            batch = batch.to(engine.device)
            # Numbered over all ranks: the same micro-batches draw the same, whoever computes them.
            seed = seed_of(job.seed, state.step, engine.rank * accumulation + number)
            output = engine(batch.token_T, batch.documents, config.attention_dropout, seed, batch.label_T,
                            token_weights(batch))
            loss = next_token(output, batch, job.z_loss_weight)
            _check_finite(loss.total, state.step, batch)
            engine.backward(loss.total)  # after the last micro-batch: reduce, clip, update
            recorder.add(loss)
        state.step, state.position = state.step + 1, loader.position

        row = recorder.end_step(state.step)
        state.skipped += not math.isfinite(row["gradient_norm"])  # DeepSpeed makes no update of these
        last = state.step == config.steps
        if last or state.step % config.evaluate_every == 0:
            beat("evaluation", state.step)
            row["held_out_bpb"] = held_out()
        recorder.log(row)
        if last or recorder.stop_requested or state.step % config.checkpoint_every == 0:
            beat("checkpoint", state.step)
            checkpoint.save(job.folder / "checkpoints", engine, state, job.identity)
    beat("end", state.step)
    if metrics:
        metrics.close()
    return state.step == config.steps


def _check_finite(loss: torch.Tensor, step: int, batch: Batch) -> None:
    if not torch.isfinite(loss):
        raise NonFiniteLoss(
            f"the loss of update {step + 1} is {loss.item()}; its documents are {', '.join(batch.document_ids())}"
        )
