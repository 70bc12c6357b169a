"""report.html: what a run has shown, on one page that needs nothing but itself.

It is written from what lies in the run's folder and from nothing else, so it can be written again at any time, and the
same files give the same bytes. The page loads nothing (its own content policy forbids it) and runs no script.
Figures are held against their bounds in moe.report.claims; a missed one is shown as missed.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jinja2
import yaml

from moe.config import PUBLIC
from moe.errors import InputError
from moe.report import numerals, plots
from moe.report.claims import MIN_PURITY, claims, optout_is_exact
from moe.run_folder import RunFolder

SCHEMA = 1
SPLITS = {"train": "training", "eval": "held out", "calibration": "calibration"}
SHORT = 12  # hex digits of a hash that a reader compares by eye


def write_page(run: RunFolder) -> Path:
    """Write report.html and return its path. Raises InputError where the run has not finished."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for form in (
        numerals.decimal,
        numerals.percent,
        numerals.count,
        numerals.duration,
        numerals.gibibytes,
    ):
        environment.filters[form.__name__] = form
    html = environment.get_template("page.html").render(_content(run))
    temporary = run.report.with_name(f".{run.report.name}.partial")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, run.report)
    return run.report


def _content(run: RunFolder) -> dict[str, Any]:
    results = _json(run, run.results)
    if results.get("schema") != SCHEMA:
        raise InputError(f"{run.results} has schema {results.get('schema')}: this version reads schema {SCHEMA}")
    config_text, manifest = _text(run, run.config), _json(run, run.manifest)
    if results["config_hash"] != manifest["config_hash"]:
        raise InputError(
            f"{run.results} is of an earlier config than {run.config}; `polyclinic train CONFIG --resume` renews it"
        )
    config = yaml.safe_load(config_text)
    owners = list(results["specialties"])
    held = claims(results, config["calibration"]["rho"])
    return {
        "name": config["run"]["name"],
        "results": results,
        "owners": owners,
        "texts": {PUBLIC: results["public"], **results["specialties"]},
        "claims": held,
        "missed": [claim.name for claim in held if not claim.holds],
        "demonstration": [d for d in (PUBLIC, *owners) if _data_section(config, d).get("demonstration")],
        "optout_is_exact": optout_is_exact(results),
        "optout_tokens": config["evaluation"]["optout_tokens"],
        "plots": _plots(run, results),
        "data": [_data(run, config, domain) for domain in (PUBLIC, *owners)],
        "packs": [pack for owner in owners if (pack := _pack(run, owner))],
        "stages": _stages(results, owners),
        "config": config_text,
        "manifest": manifest,
        "short": SHORT,
    }


def _json(run: RunFolder, path: Path) -> dict[str, Any]:
    text = _text(run, path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _text(run: RunFolder, path: Path) -> str:
    if not run.path.is_dir():
        raise InputError(f"{run.path} is no folder: want a run's, such as runs/quickstart")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{run.path} is no finished run: it has no {path.name}; `polyclinic train CONFIG --resume` finishes one"
        ) from error


def _plots(run: RunFolder, results: dict[str, Any]) -> dict[str, plots.Plot | None]:
    """Those of training are None where the jobs' metrics are not on this machine."""
    jobs = ["anchor", *(f"pack-{owner}" for owner in results["specialties"])]
    curves = {job: rows for job in jobs if (rows := _metrics(run.stage(job) / "metrics.jsonl"))}
    starts = {f"pack-{owner}": figures["anchor_bpb"] for owner, figures in results["specialties"].items()}
    routing = results["routing"]
    return {
        "training_loss": plots.training_loss(curves) if curves else None,
        "held_out": plots.held_out(curves, starts) if curves else None,
        "share": plots.share(routing["share"]),
        "purity_by_layer": plots.purity_by_layer(routing["purity_by_layer"], MIN_PURITY),
        "share_by_layer": plots.share_by_layer(routing["share_by_layer"]),
    }


def _metrics(path: Path) -> list[dict[str, Any]]:
    """As moe.train.telemetry.read, without its import of torch."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a last line that a dying process left half-written
            break
    return rows


def _data_section(config: dict[str, Any], domain: str) -> dict[str, Any]:
    return config["public"] if domain == PUBLIC else config["owners"][domain]["data"]


def _data(run: RunFolder, config: dict[str, Any], domain: str) -> dict[str, Any]:
    """What a domain's text is and how much there is of it: counts from DONE, hashes from the manifests."""
    section = _data_section(config, domain)
    if section.get("demonstration"):
        source = "built-in demonstration"
    elif section.get("noise_documents"):
        source = "random words, a control"
    else:
        source = ", ".join(Path(path).name for path in section.get("documents", ()))
    done = run.stage(f"data-{domain}") / "DONE"
    outputs = json.loads(done.read_text())["outputs"] if done.is_file() else {}
    splits = []
    for split, label in SPLITS.items():
        if f"{split}_documents" in outputs:
            manifest = run.shards(domain, split) / "manifest.json"
            counts = {unit: outputs[f"{split}_{unit}"] for unit in ("documents", "tokens", "bytes")}
            digest = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
            splits.append({"label": label, **counts, "hash": digest})
    return {"domain": domain, "source": source, "splits": splits}


def _pack(run: RunFolder, owner: str) -> dict[str, Any] | None:
    path = run.pack(owner) / "pack.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _stages(results: dict[str, Any], owners: list[str]) -> list[dict[str, Any]]:
    """In the order of the graph, not of finishing; a stage this code does not know comes last."""
    domains = [PUBLIC, *owners]
    order = [
        *(f"data-{domain}" for domain in domains),
        "anchor",
        *(f"pack-{owner}" for owner in owners),
        "merge",
        *(f"measure-{domain}" for domain in domains),
    ]
    wall = results["wall_s"]
    known = [stage for stage in order if stage in wall]
    return [
        {"name": stage, "seconds": wall[stage], "throughput": results["throughput"].get(stage)}
        for stage in (*known, *sorted(wall.keys() - set(known)))
    ]
