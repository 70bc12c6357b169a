"""Prepare a domain's text for training: read, split, and pack it; of the first domain, train the tokenizer before that.

The first domain is a specialty run's public one, whose text also has a calibration split, or the first of a job's. What
begins with another model's weights has that model's tokenizer.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moe.config import PUBLIC, DataConfig, JobConfig, RunConfig
from moe.data import sources, tokenizer
from moe.manifest import file_hash, value_hash
from moe.run_folder import RunFolder


def domains(config: RunConfig) -> dict[str, DataConfig]:
    """Where the text of each domain comes from, the first one first."""
    if isinstance(config, JobConfig):
        return config.domains
    return {PUBLIC: config.public, **{name: owner.data for name, owner in config.owners.items()}}


def prepare(config: RunConfig, run: RunFolder, domain: str) -> dict[str, Any]:
    """Write stages/data-DOMAIN/SPLIT for each split and, of the first domain, the run's tokenizer.

    Returns plain values: the hash of the packed splits and their counts. Reads no other domain's data."""
    sections = domains(config)
    folder = run.stage(f"data-{domain}")
    calibration = domain == PUBLIC and not isinstance(config, JobConfig)
    splits = sources.read(domain, sections[domain], folder, config.run.seed, calibration)
    if domain == next(iter(sections)):
        settings = None
        if config.base_model:
            theirs = config.base_model / "tokenizer.json"
            made, settings = tokenizer.load(theirs), tokenizer.load_config(theirs)
        else:
            made = tokenizer.train((row.text for row in splits["train"]), config.tokenizer.vocab_size)
        _save(made, settings, run)
    special = tokenizer.special_of(tokenizer.load_config(run.tokenizer))
    manifests = sources.pack(splits, folder, tokenizer.load(run.tokenizer), special)
    return {
        "hash": value_hash({split: manifest["files"] for split, manifest in manifests.items()}),
        "tokenizer": manifests["train"]["tokenizer"],
        **{
            f"{split}_{count}": manifest[count]
            for split, manifest in manifests.items()
            for count in ("documents", "tokens", "bytes")
        },
    }


def _save(made: Tokenizer, settings: dict[str, Any] | None, run: RunFolder) -> None:
    """As the run's, in the place of another one that was there."""
    beside = run.tokenizer.with_name(tokenizer.CONFIG)
    beside.unlink(missing_ok=True)
    if settings is not None:
        beside.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    made.save(str(run.tokenizer))


def model_hashes(folder: Path) -> dict[str, Any]:
    """What a run depends on that begins with the model of this folder: its weights, its sizes, its tokenizer."""
    from moe.hf.source import weight_files  # torch takes seconds to import: only where a model is read

    weights, tokens = [file_hash(path) for path in weight_files(folder)], folder / "tokenizer.json"
    special = tokenizer.special_of(tokenizer.load_config(tokens))
    return {
        "model": weights if len(weights) > 1 else weights[0],
        "section": file_hash(folder / "config.json"),
        "tokenizer": file_hash(tokens) if special == tokenizer.OWN else [file_hash(tokens), *special],
    }


def content(data: DataConfig) -> list[Any]:
    """What a domain's text depends on: its section, and whether its files have changed since."""
    files = [path.stat() for path in (*data.documents, *data.held_out)]
    return [data.model_dump(mode="json"), [[file.st_size, file.st_mtime_ns] for file in files]]
