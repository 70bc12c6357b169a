"""Curate files of documents: de-identify, filter, deduplicate, decontaminate; write what is left, and what became of
every row.

    OUT/documents.jsonl   or .parquet where all inputs are: the rows that stay, with the columns of COLUMNS
    OUT/changes.jsonl     a line for every row that a step has removed or changed: file, row, id, step, why; no text
    OUT/manifest.json     counts by step and reason, settings, versions, licences, hashes of all files, its own hash

Order   That of the inputs. The same inputs, settings and versions give the same bytes, with any number of processes.
Writes  beside OUT, renamed at the end: OUT is whole, or absent. There lie meanwhile the rows that are left.
Memory  40 bytes a row that passes the filter, and as much again for each step while it sorts; signatures and rows lie
        on the disk.
Errors  InputError for a file that is no documents, an OUT that exists, absent packages, and where no row is left.

De-identification looks at `text` alone: ids and other columns that stay are not looked into.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe import manifest as manifests
from moe.data import files
from moe.data.curation import contamination, duplicates, rows
from moe.data.curation.deidentify import Deidentifier, TooHard
from moe.data.curation.deidentify import check as check_deidentify
from moe.data.curation.settings import Settings
from moe.errors import InputError

COLUMNS = ("id", "specialty", "owner", "source", "licence", "concept", "text")
STEPS = ("read", "deidentify", "filter", "deduplicate", "decontaminate")
MANIFEST, CHANGES = "manifest.json", "changes.jsonl"
SCHEMA = 1
VERSIONS = ("polyclinic", "presidio-analyzer", "presidio-anonymizer", "phonenumbers", "spacy", "datasketch", "numpy")
NAMES_IN_PART = ("names and places are looked for behind titles and labels only, such as Dr. and Patient:, and in the "
                 "form of an address; those in running text stay, unless deidentify.names gives a spaCy model")
PSEUDONYMS = ("pseudonyms follow from the values they stand for, which 45 CFR 164.514(c) does not allow under Safe "
              "Harbor: want an expert determination, 164.514(b)(1)")
NOT_DONE = "text is not de-identified, because deidentify is null"
NOT_COMPARED = "nothing is decontaminated, because no evaluation files are given"

Tell = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


def check(inputs: Sequence[Path], against: Sequence[Path], out: Path | None, settings: Settings) -> None:
    """Refuse at once what cannot be done."""
    if not inputs:
        raise InputError("no documents are given: want at least one .jsonl or .parquet file")
    for path in (*inputs, *against):
        if path.suffix not in files.ENDINGS:
            raise InputError(f"{path} has the ending {path.suffix!r}: want .jsonl or .parquet")
        if not path.is_file():
            raise InputError(f"{path} does not exist: want a file")
    for paths in (inputs, against):
        names = Counter(path.name for path in paths)
        if twice := next((name for name, count in names.items() if count > 1), None):
            raise InputError(f"two files are called {twice}: want names that differ, because the account of rows uses "
                             "them")
    if against and settings.decontaminate is None:
        raise InputError("decontaminate is null in the config, and evaluation files are given: want one of them")
    if out is not None and out.exists():
        raise InputError(f"{out} exists: want a folder that does not")
    if settings.deidentify:
        check_deidentify(settings.deidentify)


def curate(
    inputs: Sequence[Path], out: Path | None, against: Sequence[Path] = (), settings: Settings | None = None,
    workers: int = 1, tell: Tell = lambda *_: None,
) -> dict[str, Any]:
    """Write `out` and return its manifest; where `out` is None, find out only what would become of the rows."""
    settings = settings or Settings()
    check(inputs, against, out, settings)
    ending = ".parquet" if all(path.suffix == ".parquet" for path in inputs) else ".jsonl"
    with _folder(out) as (folder, scratch), (folder / CHANGES).open("wb") as changes:
        work = _Curation(inputs, against, settings, scratch, changes)
        work.read(workers, tell)
        work.deduplicate(tell)
        work.decontaminate()
        documents = folder / f"documents{ending}"
        licences = work.write(documents, tell)
        changes.close()
        manifest = {
            "schema": SCHEMA,
            "kind": "curation",
            "versions": {"python": platform.python_version(), **_versions(settings)},
            "settings": _told(settings),
            "inputs": work.inputs,
            "against": work.against,
            "steps": work.steps,
            "warnings": work.warnings,
            "left_out_columns": sorted(work.left_out_columns),
            "licences": licences,
            "rows": work.num_left,
        }
        if out is not None:
            if not work.num_left:
                raise InputError(f"no row of {', '.join(path.name for path in inputs)} is left: see why with --dry-run")
            manifest["files"] = {
                path.name: {"rows": count, "bytes": path.stat().st_size, "sha256": manifests.file_hash(path)}
                for path, count in ((documents, work.num_left), (folder / CHANGES, work.num_changes))
            }
            manifests.write(folder / MANIFEST, manifest)
    return manifest


class _Curation:
    """The state of one curation: the rows that passed the first steps lie in a file, and are numbered."""

    def __init__(
        self, inputs: Sequence[Path], against: Sequence[Path], settings: Settings, scratch: Path, changes: BinaryIO
    ):
        self._paths, self._eval_paths, self._settings = inputs, against, settings
        self._scratch, self._changes = scratch, changes
        self.inputs: list[dict] = []
        self.against: list[dict] = []
        self.steps: list[dict[str, Any]] = []
        self.left_out_columns: set[str] = set()
        self.num_changes = 0
        self._items: list[contamination.Item] = []
        self._index: contamination.Index | None = None
        # Of each numbered row: where it stands in the file of rows, in which input it stood and where, its hash.
        self._starts, self._origins, self._numbers, self._exact = array("Q"), array("L"), array("Q"), array("Q")
        self._runs: dict[int, np.ndarray] = {}
        self._gone: np.ndarray = np.empty(0, bool)

    @property
    def num_left(self) -> int:
        return int(np.count_nonzero(~self._gone))

    @property
    def warnings(self) -> list[str]:
        section = self._settings.deidentify
        found = [NOT_DONE] if section is None else []
        if section and section.names is None:
            found.append(NAMES_IN_PART)
        if section and section.key:
            found.append(PSEUDONYMS)
        if self._settings.decontaminate and not self._eval_paths:
            found.append(NOT_COMPARED)
        if self._settings.columns:
            found.append(f"columns that are kept but not looked into: {', '.join(self._settings.columns)}")
        return found

    def read(self, workers: int, tell: Tell) -> None:
        """De-identify and filter; what is left goes into the file of rows."""
        index = self._read_items()
        total = 0
        for path in self._paths:
            count = files.num_rows(path)
            self.inputs.append({"file": path.name, "rows": count, "bytes": path.stat().st_size,
                                "sha256": manifests.file_hash(path)})
            total += count
        removed: dict[str, Counter] = defaultdict(Counter)
        found, touched, seen = Counter(), 0, 0
        waiting: deque[tuple[int, int, dict]] = deque()  # origins of the texts that are being looked at, and their rows

        def texts() -> Iterator[str]:
            nonlocal seen
            for origin, path in enumerate(self._paths):
                for number, row in enumerate(files.rows(path), start=1):
                    seen += 1
                    if not isinstance(row, dict):
                        raise InputError(f"{path} row {number} is no object: want one with a `text`")
                    if reason := _unreadable(row.get("text")):
                        removed["read"][reason] += 1
                        self._note(origin, number, row, "read", reason=reason)
                        continue
                    waiting.append((origin, number, row))
                    yield row["text"]

        kept, signed = self._scratch / "rows.jsonl", self._scratch / "signatures"
        with kept.open("wb") as spool, signed.open("wb") as signatures:
            for looked in rows.look(texts(), self._settings, index, workers):
                origin, number, row = waiting.popleft()
                if looked.step:
                    removed[looked.step][looked.reason] += 1
                    self._note(origin, number, row, looked.step, reason=looked.reason)
                else:
                    if looked.found:
                        touched += 1
                        found.update(looked.found)
                        self._note(origin, number, row, "deidentify", found=looked.found)
                    self._keep(origin, number, self._columns(row, looked.text), looked, spool)
                    if self._signed:
                        signatures.write(looked.signature.tobytes())
                tell("reading", seen, total)
        self._gone = np.zeros(len(self._exact), bool)
        self._step("read", total, removed["read"])
        left = total - removed["read"].total()
        if self._settings.deidentify:
            self._step("deidentify", left, removed["deidentify"], changed=touched, found=dict(sorted(found.items())))
            left -= removed["deidentify"].total()
        if self._settings.filter:
            self._step("filter", left, removed["filter"])

    def deduplicate(self, tell: Tell) -> None:
        if (section := self._settings.deduplicate) is None:
            return
        before = self.num_left
        found = {"exact": duplicates.exact(np.frombuffer(self._exact, np.uint64))}
        self._gone[[each.row for each in found["exact"]]] = True
        if self._signed and len(self._exact):
            signatures = np.memmap(self._scratch / "signatures", np.uint32, "r").reshape(-1, duplicates.PERMUTATIONS)
            with (self._scratch / "rows.jsonl").open("rb") as spool:
                found["near"] = duplicates.near(
                    signatures, self._gone, lambda row: self._row(spool, row)["text"], section,
                    lambda done, total: tell("comparing", done, total),
                )  # fmt: skip
            self._gone[[each.row for each in found["near"]]] = True
        ids = self._ids([row for group in found.values() for each in group for row in each[:2]])
        for reason, group in found.items():
            for row, of, jaccard in group:
                more = {"jaccard": jaccard} if reason == "near" else {}
                self._note_numbered(row, ids, "deduplicate", reason=reason, of=self._named(of, ids), **more)
        self._step("deduplicate", before, Counter({reason: len(group) for reason, group in found.items() if group}))

    def decontaminate(self) -> None:
        if self._index is None:
            return
        before = self.num_left
        alive = {row: runs for row, runs in self._runs.items() if not self._gone[row]}
        decision = contamination.decide(alive, self._index)
        ids = self._ids(list(decision.items))
        by_file = Counter()
        for row, number in decision.items.items():
            item = self._items[number]
            by_file[f"in {item.file}"] += 1
            self._note_numbered(row, ids, "decontaminate", reason=f"in {item.file}", item=item.id)
            self._gone[row] = True
        self._step("decontaminate", before, by_file, common_runs=decision.common_runs, spared=decision.spared)

    def write(self, path: Path, tell: Tell) -> list[dict[str, Any]]:
        """The rows that are left, and what of them is under which licence."""
        licences: dict[tuple[str, str], Counter] = defaultdict(Counter)
        columns = (*COLUMNS, *self._settings.columns)
        with (self._scratch / "rows.jsonl").open("rb") as spool, files.writer(path, columns) as write:
            for row in np.flatnonzero(~self._gone).tolist():
                values = self._row(spool, row)
                values.setdefault("id", hashlib.sha256(values["text"].encode()).hexdigest()[:16])
                key = str(values.get("licence", "not stated")), str(values.get("source", "not stated"))
                licences[key].update(rows=1, characters=len(values["text"]))
                write(values)
                tell("writing", row + 1, len(self._gone))
        return [{"licence": licence, "source": source, **counts}
                for (licence, source), counts in sorted(licences.items())]

    @property
    def _signed(self) -> bool:
        return self._settings.deduplicate is not None and self._settings.deduplicate.near

    def _read_items(self) -> Path | None:
        """Read the evaluation items; None where there is nothing to compare with."""
        section = self._settings.decontaminate
        if section is None or not self._eval_paths:
            return None
        deidentify = Deidentifier(self._settings.deidentify) if self._settings.deidentify else None
        for path in self._eval_paths:
            before = len(self._items)
            for key, text in contamination.read(path, path.name):
                texts = (text,)
                if deidentify:
                    with contextlib.suppress(TooHard):
                        texts = tuple(dict.fromkeys((text, deidentify(text)[0])))
                self._items.append(contamination.Item(path.name, key, texts))
            self.against.append({"file": path.name, "items": len(self._items) - before,
                                 "sha256": manifests.file_hash(path)})
        self._index, too_short = contamination.Index.build(self._items, section)
        self.against.append({"too_short_to_look_for": too_short})
        self._index.save(self._scratch)
        return self._scratch

    def _columns(self, row: dict[str, Any], text: str) -> dict[str, Any]:
        """Those that stay. An id is text; of the other columns of every row, so is what stays."""
        wanted = {*COLUMNS, *self._settings.columns}
        self.left_out_columns |= row.keys() - wanted
        kept = {key: value for key, value in row.items() if key in self._settings.columns
                or key in COLUMNS and isinstance(value, str)}
        kept.pop("id", None)
        if row.get("id") not in (None, ""):
            kept["id"] = str(row["id"])
        return kept | {"text": text}

    def _keep(self, origin: int, number: int, row: dict[str, Any], looked: rows.Looked, spool: BinaryIO) -> None:
        if len(looked.runs):
            self._runs[len(self._exact)] = looked.runs
        self._starts.append(spool.tell())
        self._origins.append(origin)
        self._numbers.append(number)
        self._exact.append(looked.exact)
        spool.write(files.line(row))

    def _row(self, spool: BinaryIO, row: int) -> dict[str, Any]:
        spool.seek(self._starts[row])
        return json.loads(spool.readline())

    def _ids(self, numbered: Sequence[int]) -> dict[int, str | None]:
        with (self._scratch / "rows.jsonl").open("rb") as spool:
            return {row: self._row(spool, row).get("id") for row in sorted(set(numbered))}

    def _named(self, row: int, ids: dict[int, str | None]) -> dict[str, Any]:
        return {"file": self._paths[self._origins[row]].name, "row": self._numbers[row], "id": ids[row]}

    def _note_numbered(self, row: int, ids: dict[int, str | None], step: str, **what: Any) -> None:
        self._write_change(self._named(row, ids) | {"step": step} | what)

    def _note(self, origin: int, number: int, row: dict[str, Any], step: str, **what: Any) -> None:
        key = None if row.get("id") in (None, "") else str(row["id"])
        self._write_change({"file": self._paths[origin].name, "row": number, "id": key, "step": step} | what)

    def _write_change(self, change: dict[str, Any]) -> None:
        self._changes.write(files.line(change))
        self.num_changes += 1

    def _step(self, name: str, num_rows: int, removed: Counter, **more: Any) -> None:
        gone = removed.total()
        self.steps.append({"step": name, "rows": num_rows, "kept": num_rows - gone, "removed": gone,
                           "reasons": dict(sorted(removed.items())), **more})


def _unreadable(text: Any) -> str | None:
    if not isinstance(text, str):
        return "no_text"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "not_unicode"
    return None


def _told(settings: Settings) -> dict[str, Any]:
    """Settings as the manifest has them: nothing of the key, and a model's name without the folder it lies in."""
    values = settings.model_dump(mode="json")
    if settings.deidentify:
        values["deidentify"]["key"] = settings.deidentify.key is not None
        values["deidentify"]["names"] = settings.deidentify.names and Path(settings.deidentify.names).name
    return values


def _versions(settings: Settings) -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if settings.deidentify and (names := settings.deidentify.names):
        import spacy

        folder = Path(names).is_dir()
        version = spacy.util.get_model_meta(Path(names))["version"] if folder else importlib.metadata.version(names)
        found["names"] = str(version)
    return found


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[tuple[Path, Path]]:
    """Where results and scratch files lie meanwhile. On success the first becomes `out`."""
    if out is None:
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name) / "scratch"
            scratch.mkdir()
            yield Path(name), scratch
        return
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "scratch").mkdir(parents=True)
        yield partial, partial / "scratch"
        shutil.rmtree(partial / "scratch")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
