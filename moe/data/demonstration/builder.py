"""Build the demonstration corpus of one specialty into a folder.

    manifest = build("billing", Path("corpus/billing"), seed=20, max_characters=1_400_000)

Needs    The extra `data`; nothing is downloaded.
Writes   {documents,qa,preferences}.{train,closed_book,eval}.jsonl (documents have no closed_book file) and
         manifest.json. The folder appears when it is complete, or not at all.
Bytes    The same for the same specialty, seed, cap, counts, package versions and Python version. A table's
         bytes do not depend on which other tables are written.
Errors   InputError for an unknown specialty or table, a missing package or file, a package of another version
         than the pin, a negative cap or count, and a folder that is not empty or cannot be written.
Cost     About two seconds on one core for the documents of one specialty under that cap; two to six for all
         tables without one.

Not for clinical use: see NOTICE.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path

from moe.data.demonstration import billing, packages, pharmacology, public, radiology, selection
from moe.data.demonstration.chance import CLOSED_BOOK_SHARE, EVAL_SHARE, Chance
from moe.data.demonstration.corpus import OWNERS, SPECIALTIES, SPLITS, TABLES, Corpus, Row, Topic
from moe.errors import InputError
from moe.whole import whole_or_absent

SCHEMA = 1
NOTICE = "Demonstration data, not for clinical use, coding or payment decisions."
TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected")


def build(
    specialty: str,
    out: Path,
    *,
    seed: int,
    max_characters: int | None,
    tables: Sequence[str] = TABLES,
    reports: int = 2400,
    notes: int = 2400,
    claims: int = 1200,
) -> dict:
    """Write the corpus of one specialty to `out` and return its manifest; see the module docstring.

    `max_characters` caps the training documents; questions and preferences follow in proportion. `reports`
    (radiology), `notes` (pharmacology) and `claims` (billing) count the made-up texts before the cap.
    """
    counts = {"reports": reports, "notes": notes, "claims": claims}
    _check_settings(max_characters, tables, counts)
    check_installed(specialty)
    tables = [table for table in TABLES if table in tables]

    out = Path(out)
    _check_free(out)
    corpus = _collect(specialty, Chance(seed), max_characters, tables, counts)
    with whole_or_absent(out) as folder:
        manifest = {
            "schema": SCHEMA,
            "notice": NOTICE,
            "specialty": specialty,
            "owner": OWNERS[specialty],
            "seed": seed,
            "settings": {
                "max_characters": max_characters,
                "tables": tables,
                "eval_share": EVAL_SHARE,
                "closed_book_share": CLOSED_BOOK_SHARE,
                **counts,
            },
            "python": platform.python_version(),
            "packages": {package: packages.PINS[package] for package in packages.NEEDS[specialty]},
            "sources": _sources(corpus, tables),
            "files": {
                f"{table}.{split}.jsonl": _write_rows(folder, table, split, corpus)
                for table in tables
                for split in SPLITS[table]
            },
            "dropped": {table: dict(sorted(corpus.dropped[table].items())) for table in tables},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def check_installed(specialty: str) -> None:
    """Raise InputError if the specialty is unknown or its packages are missing. Takes milliseconds."""
    if specialty not in SPECIALTIES:
        raise InputError(f"unknown specialty {specialty!r}, want one of {', '.join(SPECIALTIES)}")
    packages.check(specialty)


def _check_settings(max_characters: int | None, tables: Sequence[str], counts: dict[str, int]) -> None:
    if max_characters is not None and max_characters < 0:
        raise InputError(f"max_characters is {max_characters}, want a count of characters or None for all")
    for name, count in counts.items():
        if count < 0:
            raise InputError(f"{name} is {count}, want a count that is not negative")
    for table in tables:
        if table not in TABLES:
            raise InputError(f"unknown table {table!r}, want some of {', '.join(TABLES)}")
    if not tables:
        raise InputError(f"no table is asked for, want some of {', '.join(TABLES)}")


def _collect(
    specialty: str, chance: Chance, max_characters: int | None, tables: Sequence[str], counts: dict[str, int]
) -> Corpus:
    """The rows that the cap leaves. Questions and preferences are made together or not at all."""
    corpus = Corpus(specialty, chance)
    chosen = selection.choose(_topics(specialty, chance, counts), chance, max_characters)
    for _, documents in chosen:
        for document in documents:
            corpus.document(document)
    if "qa" in tables or "preferences" in tables:
        for topic, _ in chosen:
            topic.tasks(corpus)
        for table in ("qa", "preferences"):
            corpus.rows[table] = selection.thin_out(corpus.rows[table], chance, max_characters)
    return corpus


def _topics(specialty: str, chance: Chance, counts: dict[str, int]) -> list[Topic]:
    if specialty == "billing":
        return billing.topics(chance, counts["claims"])
    if specialty == "radiology":
        return radiology.topics(chance, counts["reports"])
    if specialty == "pharmacology":
        return pharmacology.topics(chance, counts["notes"])
    return public.topics(chance)


def _sources(corpus: Corpus, tables: Sequence[str]) -> dict[str, str]:
    """The licence of each source that has a row."""
    return dict(sorted({(row["source"], row["licence"]) for t in tables for _, row in corpus.rows[t]}))


def _write_rows(folder: Path, table: str, split: str, corpus: Corpus) -> dict:
    """Write one file, sorted by id, and return what the manifest says about it."""
    rows = sorted((row for s, row in corpus.rows[table] if s == split), key=lambda row: row["id"])
    data = "".join(_line(row) for row in rows).encode("utf-8")
    (folder / f"{table}.{split}.jsonl").write_bytes(data)
    characters = sum(len(str(row[column])) for row in rows for column in TEXT_COLUMNS if column in row)
    return {"rows": len(rows), "characters": characters, "sha256": hashlib.sha256(data).hexdigest()}


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n"


def _check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; choose another folder or remove it")


