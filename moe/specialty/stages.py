"""The training stages of a specialty run, as each worker runs them. They know no launcher: they take the config, the
run's folder and a `report`, and use the process group that stands.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from moe import tracking
from moe.config import PUBLIC, BalanceConfig, SpecialtyConfig, TrainConfig
from moe.data import tokenizer
from moe.data.loader import Batch, Loader, Source, whole_documents
from moe.data.shards import PackedDocuments
from moe.eval.bits import TOKENS_PER_BATCH, Forward, bits_per_byte
from moe.hf import folder as model_folder
from moe.hf.folder import ModelFolder
from moe.manifest import value_hash
from moe.model import Decoder
from moe.run_folder import RunFolder
from moe.specialty.pack import Pack, open_slot
from moe.specialty.triage import fit_router
from moe.train.loop import Job, train
from moe.train.recorder import Report
from moe.train.together import together
from moe.train.watchdog import Beat, no_watchdog

HELD_OUT_TOKENS = 16384  # of the evaluations during training; the last one of a run measures all of the text


def train_anchor(
    config: SpecialtyConfig,
    run: RunFolder,
    identity: str,
    device: torch.device,
    report: Report,
    beat: Beat = no_watchdog,
) -> bool:
    """Pretrain the dense anchor on public text, from scratch or from the base model, and write stages/anchor/model;
    False when it stopped before its end. Without updates that is the base model, bit for bit, whatever the run's
    precision.

    Every rank of the job must call it."""
    tokens, settings = tokenizer.load(run.tokenizer), tokenizer.load_config(run.tokenizer)
    known = tokenizer.identity(tokens, tokenizer.special_of(settings))
    model = _first_anchor(config, device, beat)
    with tracking.tracked(config, run, "anchor", dist.get_rank()) as tracker:
        if config.anchor.steps:
            tracker.used(lambda: [tracking.text(run, PUBLIC)])
            own, held_out = _open(run, [(PUBLIC, "train"), (PUBLIC, "eval")], known, device, beat)
            loader = _loader(config, config.anchor, own)
            job = _job(config, run, "anchor", identity, config.anchor)
            model.to(device)
            if not train(job, model, loader, _held_out(model, held_out, beat), tracker.hear(report), beat=beat):
                return False

        def write() -> None:
            anchor = ModelFolder(model.cpu(), tokens, tokenizer_config=settings)
            model_folder.save(run.anchor, anchor)
            tracker.made(lambda: tracking.anchor(anchor.identity()))

        together(write if dist.get_rank() == 0 else None, device, beat, "model")
        dist.barrier()
    return True


def train_pack(
    config: SpecialtyConfig,
    run: RunFolder,
    owner: str,
    identity: str,
    device: torch.device,
    report: Report,
    beat: Beat = no_watchdog,
) -> bool:
    """Train an owner's pack on its own documents and public replay; write packs/OWNER; False when it stopped early.

    Every rank of the job must call it. Of the run's data it opens the owner's and the public part only."""
    anchor = together(lambda: model_folder.load(run.anchor, device), device, beat, "anchor")
    anchor_hash = together(anchor.identity, device, beat, "anchor")
    model = open_slot(anchor.decoder, config.owners[owner].slot)
    wanted = [(owner, "train"), (owner, "eval"), (PUBLIC, "train"), (PUBLIC, "calibration")]
    known = tokenizer.identity(anchor.tokenizer, anchor.special)
    train_text, held_out, public, unseen = _open(run, wanted, known, device, beat)
    own_sample, public_sample, calibration = (
        list(_batches(config, text, tokens))
        for text, tokens in (
            (train_text, config.pack.router_tokens),
            (public, config.pack.router_tokens),
            (unseen, config.calibration.tokens),
        )
    )

    def fit_here() -> None:
        fit_router(model, own_sample, public_sample, calibration, config.calibration.rho)

    def fit(step: int) -> None:
        if step % config.pack.fit_router_every:
            return
        together(fit_here if dist.get_rank() == 0 else None, device, beat, "router")
        for layer in model.layers:
            dist.broadcast(layer.ffn.row, src=0)
            dist.broadcast(layer.ffn.bias, src=0)

    loader = _loader(config, config.pack.train, train_text, replay=public)
    job = _job(config, run, f"pack-{owner}", identity, config.pack.train, config.pack.z_loss_weight)
    with tracking.tracked(config, run, f"pack-{owner}", dist.get_rank()) as tracker:
        tracker.used(lambda: [tracking.anchor(anchor_hash), *(tracking.text(run, name) for name in (PUBLIC, owner))])
        heard = tracker.hear(report)
        if not train(job, model, loader, _held_out(model, held_out, beat), heard, before_update=fit, beat=beat):
            return False

        def write() -> None:
            fit_here()
            data = {"data": value_hash(train_text.manifest), "public_data": value_hash(public.manifest)}
            Pack.of(model, owner, anchor_hash, {**data, "training": identity}).save(run.pack(owner))
            tracker.made(lambda: tracking.pack(run, owner))

        together(write if dist.get_rank() == 0 else None, device, beat, "pack")
        dist.barrier()
    return True


def _first_anchor(config: SpecialtyConfig, device: torch.device, beat: Beat) -> Decoder:
    """As it is before its first update, on the CPU; in float32 where there will be updates. Every rank must call it."""
    if not config.base:
        return Decoder(config.model, config.tokenizer.vocab_size).initialise(config.run.seed)
    base = together(lambda: model_folder.load(config.base.model).decoder, device, beat, "base model")
    return base.cast(torch.float32) if config.anchor.steps else base


def _open(run: RunFolder, wanted: list[tuple[str, str]], tokenizer_hash: str, device: torch.device, beat: Beat
          ) -> list[PackedDocuments]:
    """A split of each domain. Every rank must call it; each hashes all of it."""
    text = [run.shards(*each) for each in wanted]
    return together(lambda: [PackedDocuments(folder, tokenizer_hash) for folder in text], device, beat, "text")


def _batches(config: SpecialtyConfig, packed: PackedDocuments, limit: int) -> Iterator[Batch]:
    return (b for b, _ in whole_documents(packed, config.model.context_length, TOKENS_PER_BATCH, limit))


def _held_out(model: Decoder, packed: PackedDocuments, beat: Beat) -> Callable[[Forward], dict[str, Any]]:
    def held_out(forward: Forward) -> dict[str, Any]:
        return {"held_out_bpb": bits_per_byte(model, packed, HELD_OUT_TOKENS, observe=lambda _: beat("evaluation"))}

    return held_out


def _loader(
    config: SpecialtyConfig, section: TrainConfig, own: PackedDocuments, replay: PackedDocuments | None = None
) -> Loader:
    length, seed = config.model.context_length, config.run.seed
    return Loader(
        Source(own, length, seed),
        section.batch_size,
        section.micro_batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        replay=Source(replay, length, seed) if replay else None,
        replay_share=config.pack.replay_share,
    )


def _job(
    config: SpecialtyConfig, run: RunFolder, stage: str, identity: str, section: TrainConfig, z_loss_weight: float = 0.0
) -> Job:
    return Job(
        folder=run.stage(stage),
        identity=identity,
        config=section,
        precision=config.run.precision,
        balance=BalanceConfig(method="none", z_loss_weight=z_loss_weight),
        seed=config.run.seed,
        deepspeed=config.deepspeed,
    )
