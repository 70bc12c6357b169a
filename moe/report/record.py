"""What lies in a run's folder, as the report reads it. Small files only: no weights, no text.

Of paths in what leaves here only the last part does (moe.places).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe import manifest as manifests
from moe import stage_folder
from moe.config import ANCHOR, PUBLIC
from moe.errors import InputError
from moe.job.stages import TRAIN
from moe.manifest import value_hash
from moe.places import placeless, without_places
from moe.run_folder import RunFolder
from moe.train import telemetry

SCHEMA = 1
SECTIONS = {"run", "model", "public", "owners", "anchor", "pack", "calibration", "evaluation"}  # of a specialty run
JOB_SECTIONS = {"run", "model", "domains", "train", "balance", "evaluation", "upcycle"}  # of an ordinary training job
COUNTS = ("documents", "tokens", "bytes")
SPLITS = {"train": "training", "eval": "held out", "calibration": "calibration"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    run: RunFolder
    config: Row  # as in config.yaml, without places
    manifest: Row
    results: Row | None  # None where the run has not finished, or goes on with another config
    stale: bool  # whether there is a results.json of an earlier config
    read: dict[str, list[Row]] = field(default_factory=dict)  # metrics by stage: a long job has much of them

    @property
    def is_job(self) -> bool:
        return "domains" in self.config

    @property
    def data_sections(self) -> dict[str, Row]:
        """Where the text of each domain comes from."""
        if self.is_job:
            return self.config["domains"]
        owners = self.config["owners"].items()
        return {PUBLIC: self.config["public"], **{name: owner["data"] for name, owner in owners}}

    @property
    def trainings(self) -> dict[str, int]:
        """Updates that each training stage is to make, in the order of the graph."""
        if self.is_job:
            return {TRAIN: self.config["train"]["steps"]}
        steps = self.config["pack"]["train"]["steps"]
        return {ANCHOR: self.config["anchor"]["steps"], **{f"pack-{owner}": steps for owner in self.config["owners"]}}

    def done(self, stage: str) -> Row | None:
        """What a finished stage's DONE says."""
        return stage_folder.done(self.run.stage(stage))

    def metrics(self, stage: str) -> list[Row]:
        if stage not in self.read:
            path = self.run.stage(stage) / "metrics.jsonl"
            self.read[stage] = telemetry.read(path) if path.is_file() else []
        return self.read[stage]

    def events(self, stage: str) -> list[Row]:
        """What has happened to a stage's job, oldest first."""
        path = self.run.stage(stage) / "events.jsonl"
        rows = telemetry.whole_lines(path) if path.is_file() else []
        return [row | {"stage": stage, "reason": without_places(row["reason"] or "")} for row in rows]

    def manifest_hash(self, domain: str, split: str) -> str | None:
        """Of a packed split; None where it is not in the folder, or damaged."""
        return _manifest(self.run.shards(domain, split))["hash"]

    def data(self, domain: str) -> Row:
        """What a domain's text is, and how much there is of it."""
        section, stage = self.data_sections[domain], self.run.stage(f"data-{domain}")
        manifests_of = {split: _manifest(stage / split) for split in SPLITS if (stage / split).is_dir()}
        if section.get("demonstration"):
            source = "built-in demonstration"
        elif section.get("noise_documents"):
            source = "random words, a control"
        else:
            source = ", ".join(Path(path).name for path in (*section["documents"], *section["held_out"]))
        corpus = stage / "corpus" / "manifest.json"
        return {
            "domain": domain,
            "source": source,
            "splits": [{"label": SPLITS[split], **values} for split, values in manifests_of.items()],
            "licences": _json(corpus).get("sources", {}) if corpus.is_file() else {},
        }


def read(run: RunFolder) -> Record:
    """Raises InputError where the folder is no run's, or its results.json is damaged or of another version."""
    if not run.path.is_dir():
        raise InputError(f"{run.path} is no folder: want a run's, such as runs/quickstart")
    for path in (run.config, run.manifest):
        if not path.is_file():
            raise InputError(f"{run.path} is no run: it has no {path.name}; want a folder that `polyclinic train` made")
    config, manifest = _config(run.config), _json(run.manifest)
    results = _json(run.results) if run.results.is_file() else None
    if results and results.get("schema") != SCHEMA:
        raise InputError(f"{run.results} has schema {results.get('schema')}: this version reads schema {SCHEMA}")
    stale = results is not None and results["config_hash"] != manifest["config_hash"]
    return Record(run, placeless(config), manifest, None if stale else results, stale)


def _config(path: Path) -> Row:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}; want it as the run wrote it") from error
    named = values.keys() if isinstance(values, dict) else set()
    if absent := (JOB_SECTIONS if "domains" in named else SECTIONS) - named:
        raise InputError(f"{path} has no section {min(absent)}: want it as the run wrote it")
    return values


def _json(path: Path) -> Row:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; want it as the run wrote it") from error


def _manifest(split: Path) -> Row:
    """Of a packed split: counts, and the hash that packs and trackers know it by; None where it is not as it was
    written."""
    try:
        values = manifests.read(split / "manifest.json")
    except (OSError, ValueError):
        return dict.fromkeys((*COUNTS, "hash"))
    return {**{name: values[name] for name in COUNTS}, "hash": value_hash(values)}
