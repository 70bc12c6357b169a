"""DICOM: the data elements of PS3.6 and the DCM terms of PS3.16 by context group, as listed in pydicom.

Only the scheme DCM is read. The same file holds seventeen other coding schemes with terms of their own.
Retired and nameless elements are left out.
"""

import collections
import functools
import re
from typing import NamedTuple

from moe.data.demonstration import packages
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Corpus, Document, Subject, Topic

PACKAGE = "pydicom"
ELEMENTS_PER_DOCUMENT = 25
TERMS_PER_DOCUMENT = 60

VALUE_REPRESENTATIONS = {
    "AE": "application entity", "AS": "age string", "AT": "attribute tag", "CS": "code string",
    "DA": "date", "DS": "decimal string", "DT": "date and time", "FD": "64-bit float",
    "FL": "32-bit float", "IS": "integer string", "LO": "long string", "LT": "long text",
    "OB": "bytes", "OD": "64-bit float array", "OF": "32-bit float array", "OL": "32-bit word array",
    "OV": "64-bit word array", "OW": "16-bit word array", "PN": "person name", "SH": "short string",
    "SL": "signed 32-bit", "SQ": "sequence of items", "SS": "signed 16-bit", "ST": "short text",
    "SV": "signed 64-bit", "TM": "time", "UC": "unlimited characters", "UI": "unique identifier",
    "UL": "unsigned 32-bit", "UN": "unknown", "UR": "resource identifier", "US": "unsigned 16-bit",
    "UT": "unlimited text", "UV": "unsigned 64-bit",
}  # fmt: skip


class Element(NamedTuple):
    number: int
    representation: str
    multiplicity: str
    name: str
    keyword: str

    @property
    def concept(self) -> str:
        return f"dicom:{self.number:08x}"

    @property
    def group(self) -> int:
        return self.number >> 16

    @property
    def tag(self) -> str:
        return f"({self.group:04X},{self.number & 0xFFFF:04X})"

    @property
    def sentence(self) -> str:
        kinds = (VALUE_REPRESENTATIONS.get(r, r) for r in self.representation.split(" or "))
        count = "a single value" if self.multiplicity == "1" else f"value multiplicity {self.multiplicity}"
        return f"{self.tag} {self.name} ({self.keyword}) holds {' or '.join(kinds)} data, {count}."


class Term(NamedTuple):
    code: str
    meaning: str
    num_groups: int  # context groups that hold it


def topics(chance: Chance) -> list[Topic]:
    return _element_topics(chance) + [_context_topic(cid, chance) for cid in sorted(_contexts())]


def _element_topics(chance: Chance) -> list[Topic]:
    """One topic for each 25 elements of one DICOM group on one side."""
    lists = collections.defaultdict(list)
    for element in _elements():
        lists[element.group, chance.side(element.concept)].append(element)
    out = []
    for (group, side), elements in sorted(lists.items()):
        for i in range(0, len(elements), ELEMENTS_PER_DOCUMENT):
            key = f"dicom-list:{group:04x}:{side}:{i}"
            out.append(_element_topic(key, side, elements[i : i + ELEMENTS_PER_DOCUMENT], chance))
    return out


def _element_topic(key: str, side: str, elements: list[Element], chance: Chance) -> Topic:
    def documents() -> list[Document]:
        lines = [f"DICOM data elements of group {elements[0].group:04X}.", *(e.sentence for e in elements)]
        return [Document(Subject(PACKAGE, key, side), "\n".join(lines))]

    def tasks(corpus: Corpus) -> None:
        for element in elements:
            subject = Subject(PACKAGE, element.concept, chance.split(element.concept))
            same = [e for e in elements if e is not element and chance.split(e.concept) == subject.split]
            _ask_element(corpus, subject, element, same, chance)

    return Topic(key, documents, tasks)


def _ask_element(
    corpus: Corpus, subject: Subject, element: Element, same: list[Element], chance: Chance
) -> None:
    """Name and tag in both directions, and the value representation."""
    rng, (name, tag) = chance.rng("dicom", element.number), (element.name, element.tag)
    other = rng.choice(same) if same else None
    if _num_tags()[name] == 1:
        question = f"What is the DICOM tag of {name}?"
        corpus.question(subject, question, tag, "name->tag", other and other.tag)
    question = f"Which DICOM element has the tag {tag}?"
    corpus.question(subject, question, name, "tag->name", other and other.name)
    if element.representation in VALUE_REPRESENTATIONS:
        right = _representation(element.representation)
        wrong = rng.choice([_representation(r) for r in VALUE_REPRESENTATIONS if r != element.representation])
        question = f"Which value representation does the DICOM element {name} {tag} use?"
        corpus.question(subject, question, right, "element->vr", wrong)


def _context_topic(cid: int, chance: Chance) -> Topic:
    concept = f"dicom-context:{cid}"
    subject = Subject(PACKAGE, concept, chance.split(concept))
    title, terms = _contexts()[cid]

    def documents() -> list[Document]:
        listed = "; ".join(f"{term.meaning} ({term.code})" for term in terms[:TERMS_PER_DOCUMENT])
        text = f"DICOM context group {cid}, {title}. Terms for structured reports: {listed}."
        return [Document(subject, text)]

    def tasks(corpus: Corpus) -> None:
        for term in terms[:TERMS_PER_DOCUMENT]:
            if term.num_groups == 1:  # a term of several groups could be on both sides
                question = f"What is the DICOM code of the term '{term.meaning}' ({title})?"
                wrong = chance.rng("term", term.code).choice(terms).code
                corpus.question(subject, question, term.code, "term->code", wrong)

    return Topic(concept, documents, tasks)


@functools.cache
def _elements() -> tuple[Element, ...]:
    table = packages.literal(packages.locate(PACKAGE, packages.DICOM_ELEMENTS), "DicomDictionary")
    return tuple(
        Element(number, representation, multiplicity, name, keyword)
        for number, (representation, multiplicity, name, retired, keyword) in sorted(table.items())
        if name and not retired
    )


@functools.cache
def _num_tags() -> collections.Counter:
    return collections.Counter(element.name for element in _elements())


def _representation(code: str) -> str:
    return f"{code}, {VALUE_REPRESENTATIONS[code]}"


@functools.cache
def _contexts() -> dict[int, tuple[str, list[Term]]]:
    """Title and DCM terms of each context group that has any."""
    concepts = packages.literal(packages.locate(PACKAGE, packages.DICOM_CONCEPTS), 'concepts["DCM"]')
    terms = collections.defaultdict(list)
    for codes in concepts.values():
        for code, (meaning, cids) in codes.items():
            for cid in cids:
                terms[cid].append(Term(code, meaning, len(cids)))
    source = packages.locate(PACKAGE, packages.DICOM_CONTEXTS).read_text(encoding="utf-8")
    names = dict(re.findall(r'^name_for_cid\[(\d+)\] = "([^"]+)"$', source, re.MULTILINE))
    spaced = {cid: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", names.get(str(cid), f"group {cid}")) for cid in terms}
    return {cid: (spaced[cid], terms[cid]) for cid in terms}
