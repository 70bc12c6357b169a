"""The training loop. Everything it calls lives in a file of its own; this one says in which order."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config import BalanceConfig, TrainConfig
from moe.data.loader import Loader
from moe.eval.bits import Forward
from moe.hashing import seed_of
from moe.model import Decoder
from moe.train import checkpoint
from moe.train.balance import Balance
from moe.train.engine import Engine
from moe.train.finite import Guard
from moe.train.objective import next_token, token_weights
from moe.train.recorder import Recorder, Report
from moe.train.routing import Watch
from moe.train.telemetry import Metrics
from moe.train.watchdog import Beat, no_watchdog


@dataclass(frozen=True)
class Job:
    """What the loop needs beside model and data; plain values only."""

    folder: Path  # of the stage: metrics.jsonl and checkpoints/
    identity: str  # hash of everything that determines the result; checkpoints of another job are not taken
    config: TrainConfig
    precision: str
    balance: BalanceConfig
    seed: int  # of attention's dropout
    deepspeed: dict[str, Any]


def train(
    job: Job,
    model: Decoder,
    loader: Loader,
    held_out: Callable[[Forward], dict[str, Any]],
    report: Report,
    before_update: Callable[[int], None] = lambda step: None,
    beat: Beat = no_watchdog,
    at_end: Callable[[Forward], None] = lambda forward: None,
) -> bool:
    """Train to the last step, or to a checkpoint when `report` asks to stop; return whether it was finished.

    `held_out`, given what is to be called in the model's place, gives figures of held-out text for the row; so given,
    `at_end` may measure what was finished. `before_update`, told the number of updates done, may set the model's
    buffers; `beat` tells a watchdog of progress. Every rank must call it, with its own part of the loader."""
    config = job.config
    model.recompute_layers = config.recompute_layers
    engine = Engine(model, config, job.precision, job.deepspeed)
    checkpoints = job.folder / "checkpoints"
    state = checkpoint.restore(checkpoints, engine, job.identity, beat)
    saver = checkpoint.Saver(checkpoints, engine, job.identity, _description(job, model), beat)
    loader.position = state.position
    metrics = Metrics(job.folder / "metrics.jsonl", state.step) if engine.rank == 0 else None
    accumulation = config.gradient_accumulation(engine.world_size)
    recorder = Recorder(engine, metrics, report, config.batch_size * model.config.context_length)
    balance, watch = Balance(model, job.balance, config.micro_batches), Watch(model, job.balance)
    guard = Guard(job.folder, engine.rank, config.max_skipped)

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
            loss = next_token(output, batch, balance)
            engine.backward(loss.total)  # after the last micro-batch: reduce, clip, update
            recorder.add(loss)
            balance.add(output.routes)
            guard.add(loss.total, batch)
        state.step, state.position = state.step + 1, loader.position

        row = recorder.end_step(state.step)
        applied = math.isfinite(row["gradient_norm"])  # DeepSpeed makes no update of the others
        state.skipped += not applied
        last = state.step == config.steps
        evaluated = last or state.step % config.evaluate_every == 0
        row |= watch.row(balance.update(applied), loads=evaluated)
        if saver.pending:  # behind this update
            row["save_stop_s"] = saver.stop_s
        if evaluated:
            beat("evaluation", state.step)
            row |= held_out(engine)
            recorder.restart_clock()
        recorder.log(row)
        saver.poll()
        if error := guard.too_many(state.step, applied):
            saver.finish()  # what was begun while all was well
            raise error
        if last or recorder.stop_requested or state.step % config.checkpoint_every == 0:
            beat("checkpoint", state.step)
            saver.save(state)  # goes on behind the next updates
            recorder.restart_clock()
    saver.finish()
    beat("end", state.step)
    if metrics:
        metrics.close()
    if state.step == config.steps:
        at_end(engine)
    return state.step == config.steps


def _description(job: Job, model: Decoder) -> dict[str, Any]:
    """What the checkpoints are of, for who finds them."""
    return {
        "model": model.config.model_dump(mode="json"),
        "vocab_size": model.embedding.num_embeddings,
        "slots": list(model.slots),
        "train": job.config.model_dump(mode="json"),
        "precision": job.precision,
        "seed": job.seed,
    }
