"""A run as Weights & Biases shows it, where `tracking.wandb` asks for it; the only file that knows wandb.

Each training job is one wandb run of the group that has our run's name, and so is what came of a specialty run. Its
id lies in the stage's folder (wandb.json): a job that goes on, by whatever launcher, goes on in the same wandb run. It
gets the config, every row of metrics, tables of routing, and artefacts that say what was made from what. An artefact
holds hashes and counts; no weights, which may have memorised text, and no text. Of the config it gets no paths, no
names of text files, which may be those of people, and no addresses.

Where wandb cannot be reached, or has no key, the job is tracked offline and says so; `wandb sync` uploads it later.
What goes wrong in wandb never ends a training job, and nothing is asked of whoever sits at the terminal. All that wandb
keeps lies in the stage's folder, and offline it speaks to nobody.
"""

import json
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from moe.config import PUBLIC, RunConfig, SpecialtyConfig
from moe.manifest import file_hash, value_hash
from moe.places import placeless
from moe.run_folder import SPLITS, RunFolder
from moe.train import preemption
from moe.whole import write_whole

INIT_SECONDS = 30  # to reach wandb's server, before the job is tracked offline
FINISH_SECONDS = 30  # to send the last rows; what is not sent then stays for `wandb sync`
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
    """`anchor_hash` is H0."""
    return Artefact("anchor", "model", {"anchor_hash": anchor_hash})


def pack(run: RunFolder, owner: str) -> Artefact:
    return Artefact(f"pack-{owner}", "pack", json.loads((run.pack(owner) / "pack.json").read_text()))


def model(run: RunFolder) -> Artefact:
    """What an ordinary job has trained."""
    from moe.hf.source import weight_files

    return Artefact("model", "model", {"files": {path.name: file_hash(path) for path in weight_files(run.model)}})


class Tracker:
    """One stage's wandb run; of other ranks, and where nothing is tracked, one that does nothing."""

    def __init__(self, wandb_run: Any = None, prefix: str = "", folder: Path = Path()):
        """`prefix` stands before the names of artefacts, which wandb shares out over the whole project; `folder` is the
        stage's."""
        self._run, self._prefix, self._folder = wandb_run, prefix, folder
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

    def used(self, artefacts: Callable[[], Sequence[Artefact]]) -> None:
        """What the run's product is made from; found out only where it is tracked."""
        self._try(lambda: self._used(artefacts()))

    def made(self, artefact: Callable[[], Artefact]) -> None:
        """What the run's product is; found out only where it is tracked."""
        self._try(lambda: self._run.log_artifact(self._artifact(artefact())))

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
            values["routing/load"] = _table(("layer", *_experts(load)), [(n, *own) for n, own in enumerate(load)])
        if share := row.get("share"):
            columns = ("domain", "layer", *_experts(next(iter(share.values()))))
            rows = [(domain, n, *own) for domain, layers in share.items() for n, own in enumerate(layers)]
            values["routing/share"] = _table(columns, rows)
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
        text = json.dumps(artefact.provenance, indent=1, sort_keys=True)
        path = self._folder / "wandb" / "provenance" / f"{artefact.name}-{value_hash(artefact.provenance)[:16]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
        # Not copied: wandb would keep the copy, and nobody changes a file whose name says what is in it.
        artifact.add_file(str(path), name="provenance.json", policy="immutable")
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
        tracker = Tracker(_start(config, run, stage), f"{config.run.name}-", run.stage(stage))
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
        tracker.used(lambda: [anchor(results["anchor_hash"]), *(pack(run, owner) for owner in config.owners)])
        slots = {owner: section.slot for owner, section in config.owners.items()}
        identity = {"model_hash": results["model_hash"], "anchor_hash": results["anchor_hash"], "slots": slots}
        tracker.made(lambda: Artefact("model", "model", identity))
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
    folder = run.stage(stage)

    def init(wandb: Any, mode: str) -> Any:
        wandb.setup(_settings(wandb))  # else it would ask a terminal for a key before it reads what `init` is given
        return wandb.init(
            project=config.tracking.project,
            id=_id(folder),
            resume="allow",
            group=config.run.name,
            job_type=stage.split("-")[0],
            name=f"{config.run.name}/{stage}",
            config=_told(config),
            dir=str(folder),
            mode=mode,
            settings=_settings(wandb),
        )

    try:
        wandb = _import(folder / "wandb")
        try:
            started = init(wandb, config.tracking.wandb)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            log.warning("wandb: %s; tracked offline in %s, for `wandb sync`", _first_line(error), folder / "wandb")
            wandb.teardown()  # which remembers the failure
            started = init(wandb, "offline")
        # Updates that are made again after a fault come twice, and are the same: wandb's own count of rows is no axis.
        started.define_metric("*", step_metric="update")
        return started
    except Exception as error:
        log.warning("wandb: %s: %s; the run goes on untracked", type(error).__name__, _first_line(error))
        return None


def _import(folder: Path) -> Any:
    """wandb: half a second that only those who use it pay. Its own files go to `folder`, and not to the user's home or
    to where they would outlive a process that is killed; of its own errors it tells nobody."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[name] = str(folder)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)  # where it makes folders for tables when it is imported
    try:
        import wandb
    finally:
        tempfile.tempdir = before
    return wandb


def _told(config: RunConfig) -> dict[str, Any]:
    """The config as others may know it; of files of text how many there are."""
    values = placeless(config.model_dump(mode="json"))
    values["cluster"].pop("address", None)
    sections = values["domains"].values() if "domains" in values else (
        values["public"], *(owner["data"] for owner in values["owners"].values()))  # fmt: skip
    for section in sections:
        section |= {key: len(section[key]) for key in ("documents", "held_out")}
    return values


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
        finish_timeout=FINISH_SECONDS,
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


def _experts(layers: Sequence[Sequence[float]]) -> list[str]:
    """A column for each expert: wandb cuts off tables of more than 10,000 rows."""
    return [str(expert) for expert in range(max(map(len, layers)))]


def _flat(figures: dict[str, dict[str, float]]) -> list[tuple[str, str, float]]:
    return [(outer, inner, value) for outer, own in figures.items() for inner, value in own.items()]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
