"""Topics and rows: what the sources hand over, and the rules that every row must pass.

A *concept* decides the side of the split. A *topic* is what the character cap keeps or leaves out as one: its
documents and the questions about them. Most topics hold one concept; a list, such as the DRGs of a category,
holds many.
"""

import collections
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from moe.data.demonstration import packages
from moe.data.demonstration.chance import Chance

SPECIALTIES = ("public", "billing", "radiology", "pharmacology")
OWNERS = {
    "public": "public",
    "billing": "billing_office",
    "radiology": "imaging_group",
    "pharmacology": "hospital_pharmacy",
}
TABLES = ("documents", "qa", "preferences")
SPLITS = {
    "documents": ("train", "eval"),
    "qa": ("train", "closed_book", "eval"),
    "preferences": ("train", "closed_book", "eval"),
}

# Vocabularies whose licences do not allow free use. Other texts sometimes quote them; such rows go.
FORBIDDEN = re.compile(r"SNOMED|LOINC|\bCPT\b|\bCDT\b|RadLex", re.IGNORECASE)
SHORTEST_DOCUMENT = 30  # characters

Row = dict[str, str | float]


@dataclass(frozen=True)
class Subject:
    """Where a row comes from, what it is about, and the side of the split that follows."""

    package: str
    concept: str
    split: str


@dataclass(frozen=True)
class Document:
    subject: Subject
    text: str


@dataclass(frozen=True)
class Topic:
    """What is kept or left out as one. Nothing is rendered before `documents` or `tasks` is called."""

    key: str
    documents: Callable[[], list[Document]]
    tasks: Callable[["Corpus"], None]


@dataclass
class Corpus:
    """The rows of one specialty as they collect, by table, and a count of those dropped and why."""

    specialty: str
    chance: Chance
    rows: dict[str, list[tuple[str, Row]]] = field(default_factory=lambda: {t: [] for t in TABLES})
    dropped: dict[str, collections.Counter] = field(
        default_factory=lambda: {t: collections.Counter() for t in TABLES}
    )
    _seen: set[str] = field(default_factory=set)
    _prompt_split: dict[str, str] = field(default_factory=dict)

    def document(self, document: Document) -> None:
        """One text for continued pretraining. A closed-book concept's documents are in training."""
        split = "eval" if document.subject.split == "eval" else "train"
        if len(document.text) < SHORTEST_DOCUMENT:
            self.dropped["documents"]["too short"] += 1
            return
        self._add("documents", document.subject, split, text=document.text)

    def question(
        self, subject: Subject, prompt: str, answer: str, kind: str, wrong: str | None = None
    ) -> None:
        """One question. A wrong answer from the same side of the split also makes a preference."""
        prompt, answer = as_prompt(prompt), as_completion(answer)
        if not answer.strip():
            self.dropped["qa"]["no answer"] += 1
            return
        if self._crosses("qa", subject, prompt):
            return
        self._add("qa", subject, subject.split, prompt=prompt, completion=answer, kind=kind)
        if wrong and as_completion(wrong).lower() != answer.lower():
            self.preference(subject, prompt, answer, wrong, kind)

    def preference(self, subject: Subject, prompt: str, chosen: str, rejected: str, kind: str,
                   stakeholder: str = "all", **pair: str | float) -> None:  # fmt: skip
        """One choice between two answers, on a matter of fact (`all`) or as one group sees it."""
        prompt, chosen, rejected = as_prompt(prompt), as_completion(chosen), as_completion(rejected)
        if chosen.lower() == rejected.lower():
            self.dropped["preferences"]["chosen equals rejected"] += 1
        elif not self._crosses("preferences", subject, prompt):
            self._add("preferences", subject, subject.split, prompt=prompt, chosen=chosen, rejected=rejected,
                      kind=kind, stakeholder=stakeholder, **pair)  # fmt: skip

    def _crosses(self, table: str, subject: Subject, prompt: str) -> bool:
        """Whether this prompt was asked on another side already; two sources may name two things alike."""
        if self._prompt_split.setdefault(prompt, subject.split) == subject.split:
            return False
        self.dropped[table]["prompt already in another split"] += 1
        return True

    def _add(self, table: str, subject: Subject, split: str, **fields: str | float) -> None:
        content = "\x00".join([table, *map(str, fields.values())])
        if FORBIDDEN.search(content):
            self.dropped[table]["forbidden vocabulary named"] += 1
            return
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        if digest in self._seen:
            self.dropped[table]["exact duplicate"] += 1
            return
        self._seen.add(digest)
        row = dict(
            fields,
            id=f"{self.specialty}-{table}-{digest}",
            specialty=self.specialty,
            owner=OWNERS[self.specialty],
            source=packages.source(subject.package),
            licence=packages.LICENCES[subject.package],
            concept=subject.concept,
        )
        self.rows[table].append((split, row))


def as_prompt(text: str) -> str:
    """Trainers join prompt and completion as they are, so the prompt ends in a cue ..."""
    text = text.strip()
    return text if text.endswith("\nAnswer:") else text + "\nAnswer:"


def as_completion(text: str) -> str:
    """... and the completion starts with one space."""
    return " " + text.strip()
