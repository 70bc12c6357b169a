"""The hospital pharmacy: drug names and classes, medicine list checks, and FHIR's medication resources."""

import collections

from moe.data.demonstration import fhir, medication_notes
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Corpus, Document, Subject, Topic
from moe.data.demonstration.drugs import PACKAGE, Drug, capital, drugs

MOST_BRANDS, MOST_NAMES = 12, 14  # in one document
SYNONYMS_ASKED = 6


def topics(chance: Chance, num_notes: int) -> list[Topic]:
    peers = collections.defaultdict(list)  # split -> names, for wrong answers
    for drug in drugs():
        if drug.in_use:
            peers[chance.split(drug.concept)].append(drug.name)
    classes = sorted({name for drug in drugs() for name in drug.classes})
    return [
        *(_drug_topic(drug, peers, classes, chance) for drug in drugs()),
        *_class_topics(chance),
        *medication_notes.topics(chance, num_notes),
        *fhir.topics("pharmacology", chance),
    ]


def _drug_topic(drug: Drug, peers: dict[str, list[str]], classes: list[str], chance: Chance) -> Topic:
    subject = Subject(PACKAGE, drug.concept, chance.split(drug.concept))

    def documents() -> list[Document]:
        return [Document(subject, _describe(drug))]

    def tasks(corpus: Corpus) -> None:
        rng = chance.rng("drug", drug.key)
        if drug.classes:
            question = f"To which MeSH class does {drug.name} belong?"
            wrong = rng.choice([name for name in classes if name not in drug.classes])
            corpus.question(subject, question, " and ".join(drug.classes), "drug->class", wrong)
        if drug.in_use:
            unlike = [name for name in drug.synonyms if drug.stem not in name]
            for name in unlike[:SYNONYMS_ASKED]:
                question = f"What is the generic name of {capital(name)}?"
                wrong = rng.choice(peers[subject.split])
                corpus.question(subject, question, drug.name, "synonym->generic", wrong)

    return Topic(drug.concept, documents, tasks)


def _describe(drug: Drug) -> str:
    parts = [f"{drug.name}."]
    if drug.classes:
        parts.append(f"In the MeSH tree it belongs to {' and '.join(drug.classes)}.")
    if drug.brands:
        brands = ", ".join(capital(name) for name in drug.brands[:MOST_BRANDS])
        parts.append(f"It is or was sold or known as {brands}.")
    if rest := [name for name in drug.synonyms if name not in drug.brands]:
        parts.append(f"Other names in use: {', '.join(rest[:MOST_NAMES])}.")
    return " ".join(parts)


def _class_topics(chance: Chance) -> list[Topic]:
    """The members of each MeSH class, once for each side."""
    members = collections.defaultdict(set)
    for drug in drugs():
        for name in drug.classes:
            members[name, chance.side(drug.concept)].add(drug.name)
    lists = {key: sorted(names) for key, names in sorted(members.items()) if len(names) > 1}
    return [_class_topic(name, side, names) for (name, side), names in lists.items()]


def _class_topic(name: str, side: str, members: list[str]) -> Topic:
    key = f"mesh-class:{name}:{side}"
    text = f"Substances that the MeSH tree places under {name}: {', '.join(members)}."
    return Topic(key, lambda: [Document(Subject(PACKAGE, key, side), text)], lambda corpus: None)
