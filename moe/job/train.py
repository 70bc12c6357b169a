"""The training of a job, as each of its ranks runs it. It knows no launcher: it takes the config, the run's folder and
a `report`, and uses the process group that stands.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from moe import tracking
from moe.config import JobConfig
from moe.data import tokenizer
from moe.data.loader import Loader, Source
from moe.eval.bits import Forward
from moe.hf import folder as model_folder
from moe.hf.from_checkpoint import model_of
from moe.job import stages
from moe.job.measure import measure
from moe.job.text import open_split
from moe.model import Decoder
from moe.model.upcycle import upcycle
from moe.parallel import Mesh, workers_on_each_node
from moe.run_folder import RunFolder
from moe.train import checkpoint
from moe.train.loop import Job, train
from moe.train.recorder import Report
from moe.train.telemetry import sayable
from moe.train.together import together
from moe.train.watchdog import Beat, no_watchdog
from moe.whole import write_whole

log = logging.getLogger(__name__)

HELD_OUT_TOKENS = 16384  # of each domain, in the evaluations during training


def train_job(
    config: JobConfig,
    run: RunFolder,
    identity: str,
    device: torch.device,
    report: Report,
    beat: Beat = no_watchdog,
) -> bool:
    """Train, measure, and write runs/NAME/model and the figures; False when it stopped before its end.

    Every rank of the job must call it. Where all updates are done already, it only measures and writes."""
    tokens, settings = tokenizer.load(run.tokenizer), tokenizer.load_config(run.tokenizer)
    known = tokenizer.identity(tokens, tokenizer.special_of(settings))
    model = build(config, config.tokenizer.vocab_size, device, beat).to(device)
    texts = {split: open_split(run, list(config.domains), split, known, device, beat) for split in ("train", "eval")}
    loader = Loader(
        Source(list(texts["train"].values()), config.model.context_length, config.run.seed),
        config.train.batch_size,
        config.train.micro_batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )

    def figures(forward: Forward, max_tokens: int | None) -> dict[str, Any]:
        return measure(model, forward, texts["eval"], max_tokens, observe=lambda _: beat("evaluation"))

    def held_out(forward: Forward) -> dict[str, Any]:
        found = figures(forward, HELD_OUT_TOKENS)
        row = {"held_out_bpb": found["bpb"], "domains": {name: own["bpb"] for name, own in found["domains"].items()}}
        return row | {"share": found["routing"]["share"]} if "routing" in found else row

    with tracking.tracked(config, run, stages.TRAIN, dist.get_rank()) as tracker:
        tracker.used(lambda: [tracking.text(run, domain) for domain in config.domains])

        def at_end(forward: Forward) -> None:
            found = figures(forward, config.evaluation.tokens) | {"world_size": dist.get_world_size()}
            if dist.get_rank() == 0:
                _write(stages.figures(config, run), found)
                tracker.summary(found)

        job = _job(config, run, identity)
        if not train(job, model, loader, held_out, tracker.hear(report), beat=beat, at_end=at_end):
            return False

        def write() -> None:
            save(config, run, tokens, settings)
            tracker.made(lambda: tracking.model(run))

        together(write if dist.get_rank() == 0 else None, device, beat, "model")
        dist.barrier()
    return True


def build(config: JobConfig, vocab_size: int, device: torch.device, beat: Beat = no_watchdog) -> Decoder:
    """The model before its first update, of which this rank has what the mesh gives it. Every rank must call it.

    `vocab_size` counts rows of the embedding: of an imported model they may be more than its tokenizer has tokens."""
    parallel = config.parallel
    nodes = workers_on_each_node(device)
    size = parallel.expert_size(nodes)
    if size < parallel.expert and dist.get_rank() == 0:
        log.warning("experts are spread over %d ranks and not %d, because the nodes have %s workers: each rank holds "
                    "more of them", size, parallel.expert, ", ".join(map(str, nodes)))
    mesh = Mesh.of(size)
    if not config.upcycle:
        model = Decoder(config.model, vocab_size, mesh=mesh, exchange_chunks=parallel.exchange_chunks)
        return model.initialise(config.run.seed)
    dense = together(lambda: model_folder.load(config.upcycle.model).decoder, device, beat, "upcycling")
    return upcycle(dense, config.model, vocab_size, config.upcycle.reinitialise, config.run.seed, mesh,
                   parallel.exchange_chunks)


def save(config: JobConfig, run: RunFolder, tokens: Tokenizer, settings: dict[str, Any] | None) -> None:
    """Write the trained model, in the run's precision, out of the last checkpoint, where it is whole."""
    last = checkpoint.open_checkpoint(checkpoint.newest(run.stage(stages.TRAIN) / "checkpoints"))
    assert last.state.step == config.train.steps, f"{last.path} is not of the last update"
    precision = getattr(torch, config.run.precision)
    model_folder.save(run.model, model_of(last, config.model, tokens, precision, settings))


def read_figures(config: JobConfig, run: RunFolder) -> dict[str, Any]:
    """What `train_job` has measured."""
    return json.loads(stages.figures(config, run).read_text())


def _job(config: JobConfig, run: RunFolder, identity: str) -> Job:
    return Job(
        folder=run.stage(stages.TRAIN),
        identity=identity,
        config=config.train,
        precision=config.run.precision,
        balance=config.balance,
        seed=config.run.seed,
        deepspeed=config.deepspeed,
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(sayable(values), indent=1, allow_nan=False) + "\n")
