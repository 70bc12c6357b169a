"""A run as Weights & Biases shows it, where `tracking.wandb` asks for it; the only file that knows wandb.

Each training job is one wandb run of the group that has our run's name, and so is what came of a specialty run. Its
id lies in the stage's folder (wandb.json): a job that goes on, by whatever launcher, goes on in the same wandb run. It
gets the config, every row of metrics, tables of routing, and artefacts that say what was made from what. An artefact
holds hashes and counts; no weights, which may have memorised text, and no text.

Where wandb cannot be reached, or has no key, the job is tracked offline and says so; `wandb sync` uploads it later.
What goes wrong in wandb never ends a training job.
"""

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from moe.config import PUBLIC, RunConfig, SpecialtyConfig
from moe.manifest import file_hash
from moe.run_folder import SPLITS, RunFolder
from moe.train import preemption
from moe.whole import write_whole

INIT_SECONDS = 30  # to reach wandb's server, before the job is tracked offline
ID_FILE = "wandb.json"

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], bool]  # as moe.train.recorder has it


@dataclass(frozen=True)
class Artefact:
    """Something made, or made from: what identifies it, in plain values."""

    name: str  # within the run
    kind: Literal["dataset", "model", "pack"]
    provenance: dict[str, Any]


def text(run: RunFolder, domain: str) -> Artefact:
    """A domain's packed text: of each split the hash of its manifest, and how much it is."""
    wanted = ("hash", "tokenizer", "documents", "tokens", "bytes")
    manifests = {split: run.shards(domain, split) / "manifest.json" for split in SPLITS}
    splits = {split: json.loads(path.read_text()) for split, path in manifests.items() if path.is_file()}
    provenance = {name: {key: split[key] for key in wanted} for name, split in splits.items()}
    return Artefact(f"data-{domain}", "dataset", provenance)


def anchor(anchor_hash: str) -> Artefact:
    return Artefact("anchor", "model", {"anchor_hash": anchor_hash})


def pack(run: RunFolder, owner: str) -> Artefact:
    return Artefact(f"pack-{owner}", "pack", json.loads((run.pack(owner) / "pack.json").read_text()))


def model(run: RunFolder) -> Artefact:
    """What an ordinary job has trained."""
    from moe.hf.source import weight_files

    return Artefact("model", "model", {path.name: file_hash(path) for path in weight_files(run.model)})


class Tracker:
    """One stage's wandb run; of other ranks, and where nothing is tracked, one that does nothing."""

    def __init__(self, wandb_run: Any = None, prefix: str = ""):
        """`prefix` stands before the names of artefacts, which wandb shares out over the whole project."""
        self._run, self._prefix = wandb_run, prefix
        self._made_from: dict[str, dict[str, Any]] = {}
        self._alarm: str | None = None

    def hear(self, report: Report) -> Report:
        """`report`, but for rows that are told here first."""
        if self._run is None:
            return report

        def heard(row: dict[str, Any]) -> bool:
            self._try(lambda: self._log(row))
            return report(row)

        return heard

    def used(self, artefacts: Iterable[Artefact]) -> None:
        """What the run's product is made from; read only where it is tracked."""
        self._try(lambda: self._used(list(artefacts)))

    def made(self, artefact: Artefact) -> None:
        self._try(lambda: self._run.log_artifact(self._artifact(artefact)))

    def summary(self, figures: dict[str, Any]) -> None:
        """Numbers that the run ends with."""
        self._try(lambda: self._run.summary.update(_numbers(figures)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        self._try(lambda: self._run.log({name: _table(columns, rows)}))

    def close(self, failed: bool) -> None:
        def finish() -> None:
            import wandb

            if preemption.noticed():
                self._run.mark_preempting()
            self._run.finish(exit_code=int(failed))
            wandb.teardown()  # finish returns before wandb's own process has written all

        self._try(finish)

    def _log(self, row: dict[str, Any]) -> None:
        values: dict[str, Any] = _numbers({"update": row["step"], **row})
        del values["step"]
        if load := row.get("routing", {}).get("load"):
            values["routing/load"] = _table(("layer", "expert", "share"), _cells(load))
        if share := row.get("share"):
            cells = [(domain, *cell) for domain, layers in share.items() for cell in _cells(layers)]
            values["routing/share"] = _table(("domain", "layer", "expert", "share"), cells)
        self._run.log(values)
        if (alarm := row.get("alarm")) and alarm != self._alarm:
            self._run.alert(f"update {row['step']}", alarm)
        self._alarm = alarm

    def _used(self, artefacts: Sequence[Artefact]) -> None:
        self._made_from |= {artefact.name: artefact.provenance for artefact in artefacts}
        self._run.config.update({"made_from": self._made_from}, allow_val_change=True)
        if not self._run.offline:  # edges of wandb's graph are drawn by its server only
            for artefact in artefacts:
                self._run.use_artifact(self._artifact(artefact))

    def _artifact(self, artefact: Artefact) -> Any:
        import wandb

        # Its version is the hash of the file in it: what two runs have in common is one version.
        artifact = wandb.Artifact(f"{self._prefix}{artefact.name}", artefact.kind, metadata=artefact.provenance)
        with artifact.new_file("provenance.json") as file:
            json.dump(artefact.provenance, file, indent=1, sort_keys=True)
        return artifact

    def _try(self, do: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            do()
        except Exception as error:
            log.warning("wandb: %s: %s; the run goes on untracked", type(error).__name__, _first_line(error))
            self._run = None


@contextmanager
def tracked(config: RunConfig, run: RunFolder, stage: str, rank: int = 0) -> Iterator[Tracker]:
    """A tracker of a stage. A job that stops at a checkpoint has not failed: it goes on in the same wandb run."""
    tracker = Tracker()
    if rank == 0 and config.tracking.wandb != "off":
        tracker = Tracker(_start(config, run, stage), f"{config.run.name}-")
    try:
        yield tracker
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close(failed=False)


def track_results(config: SpecialtyConfig, run: RunFolder) -> None:
    """What came of a specialty run: the merged model, made from the anchor and the packs, and its figures."""
    if config.tracking.wandb == "off":
        return
    results = json.loads(run.results.read_text())
    texts = {PUBLIC: results["public"], **results["specialties"]}
    with tracked(config, run, "merge") as tracker:
        tracker.used([anchor(results["anchor_hash"]), *(pack(run, owner) for owner in config.owners)])
        slots = {owner: section.slot for owner, section in config.owners.items()}
        identity = {"model_hash": results["model_hash"], "anchor_hash": results["anchor_hash"], "slots": slots}
        tracker.made(Artefact("model", "model", identity))
        columns = ("anchor_bpb", "pack_bpb", "merged_bpb", "without_owner_bpb")
        tracker.table("bits_per_byte", ("text", *columns),
                      [(name, *(own.get(column) for column in columns)) for name, own in texts.items()])
        without = {name: own["without_bpb"] for name, own in texts.items()}
        tracker.table("removal", ("text", "without", "bpb"), _flat(without))
        tracker.table("routing/share", ("domain", "expert", "share"), _flat(results["routing"]["share"]))
        tracker.summary({key: results[key] for key in ("public", "specialties", "optout", "throughput")}
                        | {"purity": results["routing"]["purity"]})


def _start(config: RunConfig, run: RunFolder, stage: str) -> Any:
    """The stage's wandb run, a new one or the one it began; None where wandb does not work at all."""
    import wandb  # half a second that only those who use it pay

    folder = run.stage(stage)

    def init(mode: str) -> Any:
        return wandb.init(
            project=config.tracking.project,
            id=_id(folder),
            resume="allow",
            group=config.run.name,
            job_type=stage.split("-")[0],
            name=f"{config.run.name}/{stage}",
            config=config.model_dump(mode="json"),
            dir=str(folder),
            mode=mode,
            settings=_settings(wandb),
        )

    try:
        try:
            started = init(config.tracking.wandb)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            log.warning("wandb: %s; tracked offline in %s, for `wandb sync`", _first_line(error), folder / "wandb")
            wandb.teardown()  # which remembers the failure
            started = init("offline")
        # Updates that are made again after a fault come twice, and are the same: wandb's own count of rows is no axis.
        started.define_metric("*", step_metric="update")
        return started
    except Exception as error:
        log.warning("wandb: %s: %s; the run goes on untracked", type(error).__name__, _first_line(error))
        return None


def _settings(wandb: Any) -> Any:
    """Without what wandb would find out by itself: host, user, command line, code, packages, usage of the machine."""
    return wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        host="",
        username="",
        program="polyclinic",
        init_timeout=INIT_SECONDS,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def _id(folder: Path) -> str:
    """Of the stage's wandb run, drawn when it first begins; a stage of other inputs has another folder."""
    path = folder / ID_FILE
    try:
        return json.loads(path.read_text())["id"]
    except (OSError, ValueError, KeyError):
        drawn = secrets.token_hex(8)
        write_whole(path, json.dumps({"id": drawn}) + "\n")
        return drawn


def _numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by their path in nested `values`, and nothing else of it."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, Real):
            found[f"{prefix}{key}"] = value
    return found


def _cells(layers: Sequence[Sequence[float]]) -> list[tuple[int, int, float]]:
    return [(layer, expert, share) for layer, shares in enumerate(layers) for expert, share in enumerate(shares)]


def _flat(figures: dict[str, dict[str, float]]) -> list[tuple[str, str, float]]:
    return [(outer, inner, value) for outer, own in figures.items() for inner, value in own.items()]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
