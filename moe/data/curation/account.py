"""What is told of a curation: every row that a step has removed or changed, counts by step, what was not done, with
which settings and versions. Never a text, nor a piece of one.
"""

import contextlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from moe.data import files
from moe.data.curation.contamination import MOST_OF_A_PHRASE, Decision
from moe.data.curation.settings import Decontaminate, Settings

VERSIONS = ("polyclinic", "presidio-analyzer", "presidio-anonymizer", "phonenumbers", "spacy", "datasketch", "numpy")
MOST_LICENCES = 100  # that the manifest names: a source may be a document's address, and so of one row each
NAMES_IN_PART = ("names and places are looked for behind titles and labels only, such as Dr. and Patient:, and in the "
                 "form of an address; those in running text stay, unless deidentify.names gives a spaCy model")
PSEUDONYMS = ("pseudonyms follow from the values they stand for, which 45 CFR 164.514(c) does not allow under Safe "
              "Harbor: want an expert determination, 164.514(b)(1)")
NOT_DONE = "text is not de-identified, because deidentify is null"
NOT_COMPARED = "nothing is decontaminated, because no evaluation files are given"


class Account:
    """A line in `changes` for every row that went or changed, and counts by step."""

    def __init__(self, changes: BinaryIO):
        self._changes = changes
        self.num_changes = 0
        self.steps: list[dict[str, Any]] = []

    def note(self, place: dict[str, Any], step: str, **what: Any) -> None:
        """`place` is what `named` gives."""
        self._changes.write(files.line(place | {"step": step} | what))
        self.num_changes += 1

    def step(self, name: str, num_rows: int, removed: Counter, **more: Any) -> None:
        gone = removed.total()
        self.steps.append({"step": name, "rows": num_rows, "kept": num_rows - gone, "removed": gone,
                           "reasons": dict(sorted(removed.items())), **more})


def named(path: Path, number: int, key: str | None) -> dict[str, Any]:
    """A row by its file, number and id."""
    return {"file": path.name, "row": number, "id": key}


def licences(counts: dict[tuple[str, str], Counter]) -> dict[str, Any]:
    """Of `counts` of rows and characters by (licence, source): those of the most rows, and how much the others are."""
    most = sorted(counts, key=lambda pair: (-counts[pair]["rows"], pair))
    others = sum((counts[pair] for pair in most[MOST_LICENCES:]), Counter(rows=0, characters=0))
    return {
        "licences": [{"licence": licence, "source": source, **counts[licence, source]}
                     for licence, source in sorted(most[:MOST_LICENCES])],
        "other_licences": {"pairs": len(most[MOST_LICENCES:]), "rows": others["rows"],
                           "characters": others["characters"]},
    }


def not_done(settings: Settings, kept: Iterable[str], compared: bool) -> list[str]:
    """Sentences on what the settings leave undone; `kept` are the columns beside text."""
    section = settings.deidentify
    if section is None:
        found = [NOT_DONE]
    else:
        found = [NAMES_IN_PART] if section.names is None else []
        found += [PSEUDONYMS] if section.key else []
        found.append("only text is looked into: what identifies a person in ids and other columns that are kept stays "
                     f"({', '.join(kept)})")
    return found + ([NOT_COMPARED] if settings.decontaminate and not compared else [])


def not_removed(section: Decontaminate, decision: Decision, too_short: int) -> list[str]:
    """Sentences on what may still be of an evaluation."""
    found = []
    if too_short:
        found.append(f"evaluation items that were not looked for, because they have fewer than {section.short_words} "
                     f"words: {too_short}")
    if decision.spared:
        found.append(f"rows that hold words of evaluation items and stay: {decision.spared}, because more than "
                     f"{section.max_rows} rows hold them, and they are less than {MOST_OF_A_PHRASE:.0%} of any item")
    return found


def told(settings: Settings) -> dict[str, Any]:
    """Settings as the manifest has them: nothing of the key, and a model's name without the folder it lies in."""
    values = settings.model_dump(mode="json")
    if settings.deidentify:
        values["deidentify"]["key"] = settings.deidentify.key is not None
        values["deidentify"]["names"] = settings.deidentify.names and Path(settings.deidentify.names).name
    return values


def versions(settings: Settings) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if settings.deidentify and (names := settings.deidentify.names):
        import spacy

        folder = Path(names).is_dir()
        version = spacy.util.get_model_meta(Path(names))["version"] if folder else importlib.metadata.version(names)
        found["names"] = str(version)
    return found
