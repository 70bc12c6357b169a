"""ICD-10-CM: the tabular list (an XML file with every note) and the code list.

A code is billable if and only if no other line of the code list is longer and starts with it. The leaves of
the XML will not do: T15.12 is a leaf, and yet only T15.12XA and its like can be billed. Codes with a seventh
character have no node in the XML.
"""

import collections
import functools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.data.demonstration import packages

PACKAGE = "simple-icd-10-cm"

NOTES = {
    "inclusionTerm": "Inclusion terms",
    "includes": "Includes",
    "excludes1": "Excludes1 (never coded together)",
    "excludes2": "Excludes2 (not part of this code)",
    "useAdditionalCode": "Use additional code",
    "codeFirst": "Code first",
    "codeAlso": "Code also",
    "notes": "Note",
}
CODE = r"[A-Z]\d[0-9A-Z](?:\.[0-9A-Z]*)?"


@dataclass(frozen=True)
class Category:
    """A three-character code with everything below it."""

    node: ElementTree.Element
    section: str
    chapter: str

    @property
    def code(self) -> str:
        return name_of(self.node)

    @property
    def title(self) -> str:
        return title_of(self.node)


@dataclass(frozen=True)
class Exclusion:
    """An Excludes1 note: no code below `stem` goes with a code below one of `targets`."""

    stem: str
    targets: tuple[str, ...]
    note: str


class Tabular:
    """The tabular list and the code list together. Codes have no dot unless they are shown."""

    def __init__(self, xml: Path, code_list: Path) -> None:
        self.root = ElementTree.parse(xml).getroot()
        lines = code_list.read_text(encoding="latin-1").splitlines()
        names = (line.split()[0] for line in lines if line.strip())
        # Lines such as A00-A09 are blocks; taken for codes they would make their first category a heading.
        self.codes = frozenset(name for name in names if "-" not in name)
        longer = {code[:i] for code in self.codes for i in range(3, len(code))}
        self.billable = self.codes - longer
        self._titles = {undotted(name_of(n)): title_of(n) for n in self.root.iter("diag")}

    def is_billable(self, code: str) -> bool:
        return undotted(code) in self.billable

    def describe(self, code: str) -> str:
        """A code's text; one with a seventh character takes the text of its stem, without X fillers."""
        code = undotted(code)
        while code and code not in self._titles:
            code = code[:-1].rstrip("X") if len(code) > 3 else ""
        return self._titles.get(code, "")

    @functools.cached_property
    def chapters(self) -> tuple[str, ...]:
        return tuple(_chapter_title(chapter) for chapter in self.root.findall("chapter"))

    @functools.cached_property
    def categories(self) -> tuple[Category, ...]:
        return tuple(
            Category(node, title_of(section), _chapter_title(chapter))
            for chapter in self.root.findall("chapter")
            for section in chapter.findall("section")
            for node in section.findall("diag")
        )

    @functools.cached_property
    def billable_below(self) -> dict[str, list[str]]:
        """The billable codes that start with each stem."""
        below = collections.defaultdict(list)
        for code in sorted(self.billable):
            for i in range(3, len(code) + 1):
                below[code[:i]].append(code)
        return below

    def exclusions(self) -> Iterator[Exclusion]:
        """Every Excludes1 note that names codes, also those of chapters and sections."""
        for chapter in self.root.findall("chapter"):
            yield from self._exclusions_of(chapter, chapter.findall("section/diag"))
        for section in self.root.iter("section"):
            yield from self._exclusions_of(section, section.findall("diag"))
        for node in self.root.iter("diag"):
            yield from self._exclusions_of(node, [node])

    def _exclusions_of(self, holder: ElementTree.Element, nodes: list) -> Iterator[Exclusion]:
        for note in notes(holder, "excludes1"):
            if targets := tuple(sorted(set(self._targets(note)))):
                for node in nodes:
                    yield Exclusion(undotted(name_of(node)), targets, note)

    def _targets(self, note: str) -> Iterator[str]:
        """The stems that a note names in brackets: single codes, lists, and ranges of categories."""
        for inside in re.findall(r"\(([^()]*)\)", note):
            for part in re.split(r",\s*|\s+and\s+", inside):
                if found := re.fullmatch(rf"({CODE})-?\s*-\s*({CODE})-?", part.strip()):
                    first, last = found[1][:3], found[2][:3]
                    yield from (c for c in self._category_codes if first <= c <= last)
                elif found := re.fullmatch(rf"({CODE})-?", part.strip()):
                    yield undotted(found[1])

    @functools.cached_property
    def _category_codes(self) -> list[str]:
        return sorted(category.code for category in self.categories)


@functools.cache
def tabular() -> Tabular:
    """The installed tabular list. Parsing it takes half a second, so it is kept."""
    return Tabular(packages.locate(PACKAGE, packages.ICD_XML), packages.locate(PACKAGE, packages.ICD_CODES))


def name_of(node: ElementTree.Element) -> str:
    return node.findtext("name") or ""


def title_of(node: ElementTree.Element) -> str:
    return node.findtext("desc") or ""


def dotted(code: str) -> str:
    return code if len(code) < 4 else f"{code[:3]}.{code[3:]}"


def undotted(code: str) -> str:
    return code.replace(".", "")


def notes(node: ElementTree.Element, tag: str) -> list[str]:
    """The notes of one kind that sit on a node itself."""
    out: list[str] = []
    for note in node.findall(f"{tag}/note"):
        text = " ".join((note.text or "").split())
        if out and out[-1].endswith(":"):  # such a note goes on in the next one
            out[-1] += " " + text
        elif text:
            out.append(text)
    return out


def render(node: ElementTree.Element, depth: int = 0) -> list[str]:
    """A node with its notes and everything below it, one line each, indented by depth."""
    pad = " " * depth
    lines = [f"{pad}{name_of(node)} {title_of(node)}"]
    for tag, label in NOTES.items():
        if found := notes(node, tag):
            lines.append(f"{pad}{label}: " + "; ".join(found))
    if (seventh := node.find("sevenChrDef")) is not None:
        meanings = (f"{e.get('char')} {e.text}" for e in seventh.findall("extension"))
        lines.append(f"{pad}Seventh character: " + "; ".join(meanings))
    for child in node.findall("diag"):
        lines += render(child, depth + 1)
    return lines


def _chapter_title(chapter: ElementTree.Element) -> str:
    return re.sub(r"\s*\(.*\)$", "", title_of(chapter))  # without the range of codes
