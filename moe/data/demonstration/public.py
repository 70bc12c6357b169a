"""Public text: Python's own documentation and the FHIR resources that belong to no specialty.

Python's part is pydoc's topics and the docstrings of the standard library, so it changes with the Python
version. Modules are parsed, never imported, and only those that the cap keeps.
"""

import ast
import collections
import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics as pydoc_topics

from moe.data.demonstration import fhir
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Corpus, Document, Subject, Topic

PACKAGE = "cpython"
LONGEST_DOCUMENT = 4000  # characters
SHORTEST_DOCSTRING = 40
SHORTEST_PARAGRAPH = 80  # shorter ones, such as "For example:", may repeat
ANSWER_CHARACTERS = range(20, 200)  # of a first sentence that answers "what is it for?"

# Tests, tools with data of their own, and what pip or a distribution adds.
SKIPPED = frozenset(
    "test tests idle_test idlelib lib2to3 turtledemo site-packages dist-packages ensurepip encodings "
    "__pycache__ _pyrepl pydoc_data".split()
)

Entry = tuple[str, str]  # qualified name, docstring


def topics(chance: Chance) -> list[Topic]:
    out = [_language_topic(name, paragraphs, chance) for name, paragraphs in _language().items()]
    out += [_module_topic(name, paths, chance) for name, paths in sorted(_modules().items())]
    return out + fhir.topics("public", chance)


@functools.cache
def _language() -> dict[str, list[str]]:
    """The paragraphs of each pydoc topic, without those that an earlier one has.

    Some topics quote others whole (`compound` holds all of `try`), and would be on both sides of the split.
    """
    seen: set[str] = set()
    out = {}
    for name, text in sorted(pydoc_topics.topics.items()):
        paragraphs = [p for p in text.split("\n\n") if p not in seen]
        if any(len(p) > SHORTEST_PARAGRAPH for p in paragraphs):
            out[name] = paragraphs
        seen.update(p for p in paragraphs if len(p) > SHORTEST_PARAGRAPH)
    return out


def _language_topic(name: str, paragraphs: list[str], chance: Chance) -> Topic:
    concept = f"topic:{name}"
    subject = Subject(PACKAGE, concept, chance.split(concept))

    def documents() -> list[Document]:
        return [Document(subject, text) for text in _packed(paragraphs)]

    return Topic(concept, documents, lambda corpus: None)


def _module_topic(name: str, paths: list[Path], chance: Chance) -> Topic:
    concept = f"python:{name}"
    subject = Subject(PACKAGE, concept, chance.split(concept))
    parsed: list[list[Entry]] = []  # filled once, by whichever of the two below comes first

    def entries() -> list[list[Entry]]:
        if not parsed:
            parsed.extend(list(_entries(path)) for path in paths)
        return parsed

    def documents() -> list[Document]:
        return [
            Document(subject, text)
            for module in entries()
            for text in _packed([f"{name}\n{docstring}" for name, docstring in module])
        ]

    def tasks(corpus: Corpus) -> None:
        rng = chance.rng("python", name)
        for module in entries():
            # The module's own docstring is a text, not an answer.
            purposes = [(n, " ".join(d.strip().split("\n\n")[0].split())) for n, d in module if "." in n]
            for n, purpose in purposes:
                if len(purpose) in ANSWER_CHARACTERS:
                    question, wrong = f"In Python, what is {n} for?", rng.choice(purposes)[1]
                    corpus.question(subject, question, purpose, "python-docstring", wrong)

    return Topic(concept, documents, tasks)


def _modules() -> dict[str, list[Path]]:
    """The source files of each top-level module of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    out = collections.defaultdict(list)
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)  # never walks into site-packages
        for name in sorted(files):
            path = Path(folder, name)
            top = path.relative_to(root).parts[0].removesuffix(".py")
            if path.suffix == ".py" and top in sys.stdlib_module_names and not top.startswith("_sysconfig"):
                out[top].append(path)
    return out


def _entries(path: Path) -> Iterator[Entry]:
    """The docstrings of a module, its public classes and their public methods, and its functions."""
    root = Path(sysconfig.get_path("stdlib"))
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and deliberately odd files
        return
    for name, node in _documented(module, tree):
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) > SHORTEST_DOCSTRING and "copyright" not in docstring.lower():
            yield name, docstring


def _documented(name: str, node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    yield name, node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return  # what is inside a function is nobody's interface
    pending = list(node.body)
    while pending:
        child = pending.pop(0)
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not child.name.startswith("_"):
                yield from _documented(f"{name}.{child.name}", child)
        elif isinstance(child, ast.If | ast.Try):  # definitions that depend on the platform
            pending = [*child.body, *child.orelse, *pending]


def _packed(parts: list[str]) -> list[str]:
    """Join parts with blank lines into texts of at most LONGEST_DOCUMENT characters; cut longer parts."""
    out, room = [], 0
    for part in parts:
        for i in range(0, len(part), LONGEST_DOCUMENT):
            piece = part[i : i + LONGEST_DOCUMENT].rstrip()
            if out and len(piece) + 2 <= room:
                out[-1] += "\n\n" + piece
                room -= len(piece) + 2
            else:
                out.append(piece)
                room = LONGEST_DOCUMENT - len(piece)
    return out
