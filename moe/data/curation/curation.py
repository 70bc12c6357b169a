"""Curate files of documents: de-identify, filter, deduplicate, decontaminate; write what is left, and what became of
every row.

    OUT/documents.jsonl   or .parquet where all inputs are: the rows that stay, with the columns of COLUMNS
    OUT/changes.jsonl     a line for every row that a step has removed or changed: file, row, id, step, why; no text
    OUT/manifest.json     counts by step and reason, settings, versions, licences, hashes of all files, its own hash

Order   That of the inputs. The same inputs, settings and versions give the same bytes, with any number of processes.
Writes  beside OUT, renamed at the end: OUT is whole, or absent. The rows that are left lie meanwhile in a file without
        a name (spool.py).
Memory  40 bytes a row that passes the filter, and as much again for each step while it sorts; signatures and rows lie
        on the disk.
Errors  InputError for a file that is no documents, an OUT that exists, absent packages, and where no row is left;
        workers.WorkerLost for a process that the machine has ended; OSError where OUT cannot be written.

De-identification looks at `text` alone: ids and other columns that stay are not looked into.
"""

import contextlib
import hashlib
import tempfile
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe import manifest as manifests
from moe.data import files
from moe.data.curation import account, contamination, duplicates, rows
from moe.data.curation.account import Account
from moe.data.curation.deidentify import Deidentifier
from moe.data.curation.deidentify import check as check_deidentify
from moe.data.curation.settings import Settings
from moe.data.curation.spool import Spool
from moe.errors import InputError
from moe.whole import whole_or_absent

COLUMNS = ("id", "specialty", "owner", "source", "licence", "concept", "text")
MANIFEST, CHANGES, SIGNATURES = "manifest.json", "changes.jsonl", "signatures"
SCHEMA = 1

Tell = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


def check(inputs: Sequence[Path], against: Sequence[Path], out: Path | None, settings: Settings) -> None:
    """Refuse at once what cannot be done."""
    if not inputs:
        raise InputError("no documents are given: want at least one .jsonl or .parquet file")
    for path in (*inputs, *against):
        if path.suffix not in files.ENDINGS:
            raise InputError(f"{path} has the ending {path.suffix!r}: want .jsonl or .parquet")
        with files.readable(path):
            there = path.is_file()
        if not there:
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
    types = files.types(inputs, _extra(settings)) if ending == ".parquet" else {}
    with (
        _folder(out) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch,
        contextlib.closing(Spool(folder)) as spool, (folder / CHANGES).open("wb") as changes,
    ):  # fmt: skip
        work = _Curation(inputs, against, settings, Path(scratch), spool, changes)
        work.read(workers, tell)
        work.deduplicate(tell)
        work.decontaminate()
        documents = folder / f"documents{ending}"
        licences = work.write(documents, types, tell)
        changes.close()
        manifest = {
            "schema": SCHEMA,
            "kind": "curation",
            "versions": account.versions(settings),
            "settings": account.told(settings),
            "inputs": work.inputs,
            "against": work.against,
            "steps": work.account.steps,
            "warnings": work.warnings,
            "left_out_columns": sorted(work.left_out_columns),
            **licences,
            "rows": work.num_left,
        }
        if out is not None:
            if not work.num_left:
                raise InputError(f"no row of {', '.join(path.name for path in inputs)} is left: see why with --dry-run")
            manifest["files"] = {
                path.name: {"rows": count, "bytes": path.stat().st_size, "sha256": manifests.file_hash(path)}
                for path, count in ((documents, work.num_left), (folder / CHANGES, work.account.num_changes))
            }
            manifests.write(folder / MANIFEST, manifest)
    return manifest


class _Curation:
    """The state of one curation: the rows that passed the first steps lie in the spool, and are numbered there."""

    def __init__(
        self, inputs: Sequence[Path], against: Sequence[Path], settings: Settings, scratch: Path, spool: Spool,
        changes: BinaryIO,
    ):  # fmt: skip
        self._paths, self._eval_paths, self._settings = inputs, against, settings
        self._scratch, self._spool, self.account = scratch, spool, Account(changes)
        self.inputs: list[dict] = []
        self.against: list[dict] = []
        self.left_out_columns: set[str] = set()
        self._items: list[contamination.Item] = []
        self._index: contamination.Index | None = None
        self._too_short = 0
        self._exact = array("Q")  # of each numbered row, a hash
        self._runs: dict[int, np.ndarray] = {}
        self._gone: np.ndarray = np.empty(0, bool)
        kept = [name for name in (*COLUMNS, *_extra(settings)) if name != "text"]
        self.warnings = account.not_done(settings, kept, compared=bool(against))

    @property
    def num_left(self) -> int:
        return int(np.count_nonzero(~self._gone))

    def read(self, workers: int, tell: Tell) -> None:
        """De-identify and filter; what is left goes into the file of rows."""
        index = self._read_items()
        total = 0
        for path in self._paths:
            count, size = files.num_rows(path), path.stat().st_size
            self.inputs.append({"file": path.name, "rows": count, "bytes": size, "sha256": files.sha256(path)})
            total += count
        removed: dict[str, Counter] = defaultdict(Counter)
        found, touched, seen = Counter(), 0, 0
        # In the order of the rows: origin, number, what else stays, and why nobody looks at it, if so.
        waiting: deque[tuple[int, int, dict, str | None]] = deque()

        def note_unreadable() -> None:
            """Of the rows that come next."""
            while waiting and waiting[0][-1]:
                origin, number, kept, reason = waiting.popleft()
                removed["read"][reason] += 1
                self.account.note(account.named(self._paths[origin], number, kept.get("id")), "read", reason=reason)

        def texts() -> Iterator[str]:
            nonlocal seen
            for origin, path in enumerate(self._paths):
                for number, row in enumerate(files.rows(path), start=1):
                    seen += 1
                    if not isinstance(row, dict):
                        raise InputError(f"{path} row {number} is no object: want one with a `text`")
                    kept = self._columns(row)
                    reason = _unreadable(path, number, row.get("text"), kept)
                    waiting.append((origin, number, {"id": kept.get("id")} if reason else kept, reason))
                    note_unreadable()
                    if not reason:
                        yield row["text"]

        with (
            (self._scratch / SIGNATURES).open("wb") as signatures,
            contextlib.closing(rows.look(texts(), self._settings, index, workers)) as looked_at,
        ):
            for looked in looked_at:
                note_unreadable()
                origin, number, kept, _ = waiting.popleft()
                named = account.named(self._paths[origin], number, kept.get("id"))
                if looked.step:
                    removed[looked.step][looked.reason] += 1
                    self.account.note(named, looked.step, reason=looked.reason)
                else:
                    if looked.found:
                        touched += 1
                        found.update(looked.found)
                        self.account.note(named, "deidentify", found=looked.found)
                    if len(looked.runs):
                        self._runs[len(self._spool)] = looked.runs
                    self._spool.add(origin, number, kept | {"text": looked.text})
                    self._exact.append(looked.exact)
                    if self._signed:
                        signatures.write(looked.signature.tobytes())
                tell("reading", seen, total)
        note_unreadable()
        self._gone = np.zeros(len(self._exact), bool)
        self.account.step("read", total, removed["read"])
        left = total - removed["read"].total()
        if self._settings.deidentify:
            more = {"changed": touched, "found": dict(sorted(found.items()))}
            self.account.step("deidentify", left, removed["deidentify"], **more)
            left -= removed["deidentify"].total()
        if self._settings.filter:
            self.account.step("filter", left, removed["filter"])

    def deduplicate(self, tell: Tell) -> None:
        if (section := self._settings.deduplicate) is None:
            return
        before = self.num_left
        found = {"exact": duplicates.exact(np.frombuffer(self._exact, np.uint64))}
        self._gone[[each.row for each in found["exact"]]] = True
        if self._signed and len(self._exact):
            signatures = np.memmap(self._scratch / SIGNATURES, np.uint32, "r").reshape(-1, duplicates.PERMUTATIONS)
            found["near"] = duplicates.near(
                signatures, self._gone, lambda row: self._spool[row]["text"], section,
                lambda done, total: tell("comparing", done, total),
            )  # fmt: skip
            self._gone[[each.row for each in found["near"]]] = True
        for reason, group in found.items():
            for row, of, jaccard in group:
                more = {"jaccard": jaccard} if reason == "near" else {}
                self.account.note(self._named(row), "deduplicate", reason=reason, of=self._named(of), **more)
        removed = {reason: len(group) for reason, group in found.items() if group}
        self.account.step("deduplicate", before, Counter(removed))

    def decontaminate(self) -> None:
        if self._index is None:
            return
        before = self.num_left
        alive = {row: runs for row, runs in self._runs.items() if not self._gone[row]}
        decision = contamination.decide(alive, self._index)
        by_file = Counter()
        for row, number in decision.items.items():
            item = self._items[number]
            by_file[f"in {item.file}"] += 1
            self.account.note(self._named(row), "decontaminate", reason=f"in {item.file}", item=item.id)
            self._gone[row] = True
        self.account.step("decontaminate", before, by_file, common_runs=decision.common_runs, spared=decision.spared)
        self.warnings += account.not_removed(self._index.section, decision, self._too_short)

    def write(self, path: Path, types: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """The rows that are left; return what of them is under which licence."""
        counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
        with files.writer(path, (*COLUMNS, *_extra(self._settings)), types) as write:
            for row in np.flatnonzero(~self._gone).tolist():
                values = self._spool[row]
                values.setdefault("id", hashlib.sha256(values["text"].encode()).hexdigest()[:16])
                pair = values.get("licence", "not stated"), values.get("source", "not stated")
                counts[pair].update(rows=1, characters=len(values["text"]))
                write(values)
                tell("writing", row + 1, len(self._gone))
        return account.licences(counts)

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
            own = [*contamination.read(path, deidentify)]
            self._items += own
            self.against.append({"file": path.name, "items": len(own), "sha256": files.sha256(path)})
        self._index, self._too_short = contamination.Index.build(self._items, section)
        self.against.append({"too_short_to_look_for": self._too_short})
        self._index.save(self._scratch)
        return self._scratch

    def _columns(self, row: dict[str, Any]) -> dict[str, Any]:
        """Those that stay beside the text. An id is text; of the other columns of every row, so is what stays."""
        extra = _extra(self._settings)
        self.left_out_columns |= row.keys() - {*COLUMNS, *extra}
        kept = {name: row[name] for name in COLUMNS if name not in ("id", "text") and isinstance(row.get(name), str)}
        kept |= {name: row[name] for name in extra if name in row}
        return kept | ({} if (key := files.key(row)) is None else {"id": key})

    def _named(self, row: int) -> dict[str, Any]:
        origin, number = self._spool.place(row)
        return account.named(self._paths[origin], number, self._spool[row].get("id"))


def _extra(settings: Settings) -> list[str]:
    """Columns that are kept beside those of every row."""
    return [name for name in dict.fromkeys(settings.columns) if name not in COLUMNS]


def _unreadable(path: Path, number: int, text: Any, kept: dict[str, Any]) -> str | None:
    """Why a row cannot be used; InputError where what is kept of it cannot be written."""
    if not isinstance(text, str):
        return "no_text"
    try:
        text.encode()
        files.line(kept)
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "not_unicode"
    except (TypeError, RecursionError):
        said = "has in a column that is kept what JSON cannot say: want text, numbers, dates, or lists of them"
        raise InputError(f"{path} row {number} {said}") from None
    return None


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where results are written. On success it becomes `out`."""
    if out is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    else:
        with whole_or_absent(out) as partial:
            yield partial
