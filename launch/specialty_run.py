"""The stages of a specialty run, and how each is put on the cluster.

    data-public ──► anchor ──┬──► pack-OWNER ──┬──► merge ──► measure-DOMAIN
         └────► data-OWNER ──┘  (side by side) ┘
"""

from typing import Any

from launch.demand import Label, of_anchor, of_pack, owner_label
from launch.graph import Outputs, Stage
from launch.jobs import Jobs
from launch.session import Capacity
from launch.worker import measure_domain, merge_packs, prepare_domain
from moe.config import ANCHOR, PUBLIC, SpecialtyConfig
from moe.data.prepare import content, model_hashes
from moe.hf.folder import load as load_model
from moe.run_folder import RunFolder
from moe.specialty.pack import Pack


class SpecialtyRun:
    """Builds the stages of one run on a connected cluster."""

    def __init__(self, config: SpecialtyConfig, run: RunFolder, capacity: Capacity):
        self.config, self.jobs = config, Jobs(config, run, capacity)
        self.run, owners = self.jobs.run, config.owners
        self._anchor = self.jobs.gang(ANCHOR, of_anchor(config))
        for owner in owners:
            self.jobs.gang(f"pack-{owner}", of_pack(config, owner), len(owners))

    def stages(self) -> list[Stage]:
        config, run, owners = self.config, self.run, list(self.config.owners)
        seed, backend = config.run.seed, config.run.backend
        # What is passed through to DeepSpeed can move roundings only.
        common = {"seed": seed, "precision": config.run.precision, "backend": backend}
        base = model_hashes(config.base.model) if config.base else None
        anchor = config.anchor.learned() | ({"base": base} if base else {})
        stages = [
            Stage(
                f"data-{PUBLIC}",
                settings=[content(config.public), base["tokenizer"] if base else config.tokenizer.vocab_size, seed],
                run=lambda _: self._task(prepare_domain, PUBLIC),
                makes=(run.tokenizer, *(run.shards(PUBLIC, split) for split in ("train", "calibration", "eval"))),
            ),
            Stage(
                "anchor",
                settings=[config.model.model_dump(mode="json"), anchor, common],
                run=self._train_anchor,
                needs=(f"data-{PUBLIC}",),
                makes=(run.anchor,),
                prepare=self._anchor.prepare,
                abandon=self._anchor.abandon,
            ),
        ]
        stages += [
            Stage(
                f"data-{owner}",
                settings=[content(config.owners[owner].data), seed],
                run=lambda _, owner=owner: self._task(prepare_domain, owner),
                needs=(f"data-{PUBLIC}",),
                makes=(run.shards(owner, "train"), run.shards(owner, "eval")),
            )
            for owner in owners
        ]
        pack = config.pack.model_dump(mode="json") | {"train": config.pack.train.learned()}
        pack_settings = [pack, config.calibration.model_dump(mode="json"), common]
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
                run=lambda _: self.jobs.result(merge_packs.remote(run, owners)),
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

    def _task(self, function: Any, domain: str) -> Outputs:
        label = self._label(domain)
        placed = function.options(label_selector=dict([label])) if label else function
        return self.jobs.result(placed.remote(self.jobs.values, self.run, domain), label)

    def _train_anchor(self, inputs: str) -> Outputs:
        self.jobs.train(ANCHOR, inputs)
        return {"anchor_hash": load_model(self.run.anchor).identity()}

    def _train_pack(self, owner: str, inputs: str) -> Outputs:
        self.jobs.train(f"pack-{owner}", inputs, owner=owner)
        pack = Pack.load(self.run.pack(owner))
        return {"slot": pack.slot, "anchor_hash": pack.anchor_hash, "tensors": pack.hashes()}

    def _label(self, domain: str) -> Label | None:
        """Of the nodes that may read a domain's text."""
        return owner_label(self.config, domain) if domain != PUBLIC else None
