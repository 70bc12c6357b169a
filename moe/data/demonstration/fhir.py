"""HL7 FHIR R5 and R4B prose, shared out over the specialties by resource.

Read from the class docstrings and field descriptions of fhir.resources. Two things repeat: boilerplate that
many resources share, and R4B after R5. A description in more than four files is dropped everywhere; any other
belongs to the first file that has it, R5 before R4B, so no text is in two documents or on two sides.
"""

import ast
import collections
import functools
import re
from pathlib import Path
from typing import NamedTuple

from moe.data.demonstration import packages
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import FORBIDDEN, Corpus, Document, Subject, Topic

PACKAGE = "fhir.resources"
MOST_FILES = 4  # more files than this share a description: boilerplate
ELEMENTS_PER_DOCUMENT = 10
SHORTEST_DESCRIPTION = 30  # characters

# Resources that are not listed here are public.
RESOURCES = {
    "billing": """account chargeitem chargeitemdefinition claim claimresponse contract coverage
        coverageeligibilityrequest coverageeligibilityresponse enrollmentrequest enrollmentresponse
        explanationofbenefit insuranceplan invoice monetarycomponent money paymentnotice
        paymentreconciliation visionprescription""",
    "radiology": """bodystructure device deviceassociation devicedefinition devicemetric deviceusage
        diagnosticreport imagingselection imagingstudy media observation observationdefinition procedure
        servicerequest specimen specimendefinition""",
    "pharmacology": """administrableproductdefinition adverseevent allergyintolerance clinicalusedefinition
        detectedissue dosage formularyitem immunization immunizationevaluation immunizationrecommendation
        ingredient manufactureditemdefinition marketingstatus medication medicationadministration
        medicationdispense medicationknowledge medicationrequest medicationstatement
        medicinalproductdefinition nutritionintake nutritionorder nutritionproduct
        packagedproductdefinition productshelflife regulatedauthorization substance substancedefinition
        substancenucleicacid substancepolymer substanceprotein substancereferenceinformation
        substancesourcematerial""",
}
SPECIALTY = {name: specialty for specialty, names in RESOURCES.items() for name in names.split()}

_STRING = r"""(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
_DESCRIPTION = re.compile(rf"description=(?:\(\s*)?({_STRING}(?:\s+{_STRING})*)")


class Element(NamedTuple):
    """One field of a FHIR class."""

    owner: str  # the class
    purpose: str  # what the class is for
    name: str
    title: str
    description: str


def topics(specialty: str, chance: Chance) -> list[Topic]:
    """One topic for each resource that has a description of its own."""
    files = collections.defaultdict(list)
    for path in _owned():
        if SPECIALTY.get(path.stem, "public") == specialty:
            files[path.stem].append(path)
    return [_topic(stem, paths, chance) for stem, paths in sorted(files.items())]


def _topic(stem: str, paths: list[Path], chance: Chance) -> Topic:
    concept = f"fhir:{stem}"
    subject = Subject(PACKAGE, concept, chance.split(concept))

    def documents() -> list[Document]:
        return [Document(subject, text) for path in paths for text in _texts(path)]

    def tasks(corpus: Corpus) -> None:
        for path in paths:
            release, rng = _release(path), chance.rng("fhir", _release(path), stem)
            for owner, elements in _by_class(path).items():
                for element in elements:
                    question = f"In FHIR {release}, what does {owner}.{element.name} hold?"
                    wrong = rng.choice(elements).description
                    corpus.question(subject, question, element.description, "fhir-element", wrong)

    return Topic(concept, documents, tasks)


def _texts(path: Path) -> list[str]:
    out = []
    for owner, elements in _by_class(path).items():
        for i in range(0, len(elements), ELEMENTS_PER_DOCUMENT):
            part = elements[i : i + ELEMENTS_PER_DOCUMENT]
            head = f"FHIR {_release(path)} {owner}. {part[0].purpose}"
            out.append("\n".join([head, *(f"{e.name} ({e.title}): {e.description}" for e in part)]))
    return out


def _by_class(path: Path) -> dict[str, list[Element]]:
    owned = _owned()[path]
    out = collections.defaultdict(list)
    for element in _elements(path):
        # Left to the row guard, one such element would take the nine beside it along.
        if element.description in owned and not FORBIDDEN.search(element.title + element.description):
            out[element.owner].append(element)
    return out


@functools.cache
def _owned() -> dict[Path, frozenset[str]]:
    """The descriptions that belong to each file, R5 first; files with none are left out.

    A regular expression over the source finds the same descriptions as the syntax tree, ten times faster, and
    every file has to be looked at even where only a few are rendered.
    """
    folder = packages.locate(PACKAGE, packages.FHIR_FOLDER)
    num_files: collections.Counter = collections.Counter()
    first: dict[str, Path] = {}
    for path in [*sorted(folder.glob("*.py")), *sorted(folder.glob("R4B/*.py"))]:
        literals = set(_DESCRIPTION.findall(path.read_text(encoding="utf-8")))
        for text in {_plain(ast.literal_eval(f"({literal})")) for literal in literals}:
            num_files[text] += 1
            first.setdefault(text, path)
    owned = collections.defaultdict(set)
    for text, path in first.items():
        if num_files[text] <= MOST_FILES and len(text) > SHORTEST_DESCRIPTION:
            owned[path].add(text)
    order = sorted(owned, key=lambda path: (_release(path) == "R4B", path))
    return {path: frozenset(owned[path]) for path in order}


@functools.cache
def _elements(path: Path) -> tuple[Element, ...]:
    """Every field of a file's classes that has a title and a description, in the order of the file."""
    out = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        # The docstrings open with a disclaimer about the Python classes.
        purpose = _plain((ast.get_docstring(node) or "").split("Primitive Data Types.", 1)[-1])
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call):
                options = {k.arg: k.value for k in item.value.keywords}
                if "title" in options and "description" in options:
                    title, text = (ast.literal_eval(options[k]) for k in ("title", "description"))
                    if title and text:
                        out.append(Element(node.name, purpose, item.target.id, _plain(title), _plain(text)))
    return tuple(out)


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())


def _release(path: Path) -> str:
    return "R4B" if path.parent.name == "R4B" else "R5"
