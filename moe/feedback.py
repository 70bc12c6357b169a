"""What people say of a model's answers, kept until its owner aligns the next pack with it.

    QUEUE/OWNER.jsonl     one judgement a line, oldest first; an owner's words are in no other owner's file
    QUEUE/OWNER.torn-N    the half of a line that a power cut has left, taken aside

A judgement is of one answer (a thumb) or of two (which is better), by a person of one stakeholder group. Files are only
ever added to, under a lock, and on the disk before `add` returns. They hold prompts and answers: nobody but their
writer may read them.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from pydantic import Field, ValidationError, model_validator

from moe.config import STAKEHOLDERS
from moe.config.section import NAME, Section
from moe.errors import InputError
from moe.manifest import value_hash

WRITER_ONLY = 0o600
CONTENT = ("owner", "stakeholder", "prompt", "answer", "thumb", "chosen", "rejected", "model")  # what an id is of


class Judgement(Section):
    """One line of a queue."""

    owner: str  # whose expert is to learn from it
    stakeholder: Literal[*STAKEHOLDERS]  # who judges
    prompt: str = Field(min_length=1)
    answer: str | None = None  # with a thumb; or
    thumb: Literal["up", "down"] | None = None
    chosen: str | None = None  # the better one, and
    rejected: str | None = None  # the other
    model: str | None = None  # hash of the model that answered
    comment: str | None = None
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if not NAME.fullmatch(self.owner):
            raise ValueError(f"owner={self.owner!r}: want a name of lower-case letters, digits and '_'")
        single, pair = (self.answer, self.thumb), (self.chosen, self.rejected)
        if (None in single) == (None in pair) or (any(single) and any(pair)):
            raise ValueError("want an answer with a thumb, or a chosen and a rejected answer")
        if self.chosen is not None and self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same: want two answers")
        return self

    @property
    def id(self) -> str:
        """Of what is judged and how, so that the same judgement told twice is one."""
        return value_hash({key: getattr(self, key) for key in CONTENT})[:16]


def parse(values: Any, where: str) -> Judgement:
    """Of a line of a queue too, whose id is then held against what it is of. Raises InputError naming `where` and the
    key."""
    known = None
    if isinstance(values, dict):
        values = dict(values)
        known = values.pop("id", None)
    try:
        judgement = Judgement.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        said = problem["msg"].removeprefix("Value error, ").replace("Input should be", "want")
        raise InputError(f"{where}: {f'{key}: ' if key else ''}{said}") from None
    if known not in (None, judgement.id):
        raise InputError(f"{where}: id={known!r} is not that of this judgement: want {judgement.id}, or no id")
    return judgement


def add(queue: Path, judgements: Iterable[Judgement]) -> tuple[int, int]:
    """Put them at the end of their owners' files: (how many were added, how many were there already). Raises InputError
    where the queue is no folder, or a line of it is none of ours; OSError where it cannot be written: what was added
    until then stays, and adding again adds the rest."""
    by_owner: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        by_owner.setdefault(judgement.owner, []).append(judgement)
    added = known = 0
    if queue.exists() and not queue.is_dir():
        raise InputError(f"{queue} is no folder: want a queue, or a name that is free")
    queue.mkdir(parents=True, exist_ok=True)
    for owner, own in by_owner.items():
        path = queue / f"{owner}.jsonl"
        with _open(path) as file:
            there = {_values(line, f"{path} line {number}")["id"] for number, line in enumerate(file, start=1)}
            lines = []
            for judgement in own:
                if judgement.id in there:
                    known += 1
                    continue
                there.add(judgement.id)
                lines.append(_line(judgement))
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
            added += len(lines)
    return added, known


def read(queue: Path, owner: str | None = None, stakeholder: str | None = None) -> Iterator[Judgement]:
    """All, or those of an owner or a group, oldest first within each owner. Raises InputError where there is no queue,
    or a line is not one of ours."""
    if not queue.is_dir():
        raise InputError(f"{queue} is no folder: want a queue, such as `polyclinic feedback add` makes")
    for path in sorted(queue.glob("*.jsonl")):
        if owner not in (None, path.stem):
            continue
        try:
            content = path.read_bytes()
        except OSError as error:  # the files are their writer's alone
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # being written, or what a power cut has left
            where = f"{path} line {number}"
            judgement = parse(_values(line, where), where)
            if stakeholder in (None, judgement.stakeholder):
                yield judgement


def as_preferences(judgements: Iterable[Judgement]) -> list[dict[str, Any]]:
    """Of the pairs: rows for preference alignment (TRL's DPOTrainer; `stakeholder` groups them)."""
    return [{"id": j.id, "owner": j.owner, "stakeholder": j.stakeholder, "prompt": j.prompt, "chosen": j.chosen,
             "rejected": j.rejected} for j in judgements if j.chosen is not None]


def as_thumbs(judgements: Iterable[Judgement]) -> list[dict[str, Any]]:
    """Rows for unpaired alignment (TRL's KTOTrainer): thumbs, and of a pair each answer."""
    rows = []
    for j in judgements:
        answers = [(j.answer, j.thumb == "up")] if j.thumb else [(j.chosen, True), (j.rejected, False)]
        rows += [{"id": j.id, "owner": j.owner, "stakeholder": j.stakeholder, "prompt": j.prompt, "completion": answer,
                  "label": wanted} for answer, wanted in answers]
    return rows


def _values(line: bytes, where: str) -> dict[str, Any]:
    """Of a line of a queue."""
    try:
        values = json.loads(line)
        if not isinstance(values["id"], str):
            raise ValueError("its id is no text")
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{where} is none of a queue: want it as it was written") from None
    return values


def _line(judgement: Judgement) -> bytes:
    values = {"id": judgement.id, **judgement.model_dump(mode="json", exclude_none=True)}
    return (json.dumps(values, ensure_ascii=False) + "\n").encode()


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """An owner's file, ours alone until it is closed, read from its beginning and written at its end."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, WRITER_ONLY), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _take_torn_aside(path, file)
        yield file


def _take_torn_aside(path: Path, file: BinaryIO) -> None:
    whole = file.read()
    file.seek(0)
    end = whole.rfind(b"\n") + 1
    if end == len(whole):
        return
    number = 1
    while (aside := path.with_suffix(f".torn-{number}")).exists():
        number += 1
    aside.touch(mode=WRITER_ONLY)
    aside.write_bytes(whole[end:])
    file.truncate(end)
