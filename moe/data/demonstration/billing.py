"""The billing office: ICD-10-CM categories, payment groups, claim reviews and FHIR's financial resources."""

from random import Random
from xml.etree.ElementTree import Element

from moe.data.demonstration import claims, fhir, icd, payment_groups
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Corpus, Document, Subject, Topic

CODES_ASKED = 12  # of each category, in both directions
BILLABLE_ASKED = 3
NOTES_ASKED = {
    "excludes1": "What may never be coded together with {code} ({title})?",
    "codeFirst": "What is coded before {code} ({title})?",
    "useAdditionalCode": "Which additional code goes with {code} ({title})?",
    "inclusionTerm": "Which terms are included in {code} ({title})?",
}
COMPLETE, INCOMPLETE = "Yes, it is complete.", "No, it needs more characters."


def topics(chance: Chance, num_claims: int) -> list[Topic]:
    return [
        *(_category_topic(category, chance) for category in icd.tabular().categories),
        *payment_groups.topics(chance),
        *claims.topics(chance, num_claims),
        *fhir.topics("billing", chance),
    ]


def _category_topic(category: icd.Category, chance: Chance) -> Topic:
    concept = f"icd10cm:{category.code}"
    subject = Subject(icd.PACKAGE, concept, chance.split(concept))

    def documents() -> list[Document]:
        head = f"ICD-10-CM, {category.chapter}. {category.section}."
        return [Document(subject, "\n".join([head, *icd.render(category.node)]))]

    def tasks(corpus: Corpus) -> None:
        rng, nodes = chance.rng("icd", category.code), list(category.node.iter("diag"))
        _ask_codes(corpus, subject, nodes, rng)
        _ask_notes(corpus, subject, nodes)
        _ask_billable(corpus, subject, nodes, rng)
        others = [chapter for chapter in icd.tabular().chapters if chapter != category.chapter]
        question = f"In which ICD-10-CM chapter is {category.code}, {category.title}?"
        corpus.question(subject, question, category.chapter, "category->chapter", rng.choice(others))

    return Topic(concept, documents, tasks)


def _ask_codes(corpus: Corpus, subject: Subject, nodes: list[Element], rng: Random) -> None:
    """Code and description in both directions; the wrong answer is another code of the category."""
    billable = [node for node in nodes if icd.tabular().is_billable(icd.name_of(node))]
    for node in rng.sample(billable, min(len(billable), CODES_ASKED)):
        code, title = icd.name_of(node), icd.title_of(node)
        siblings = [n for n in billable if n is not node]
        other = rng.choice(siblings) if siblings else None
        wrong_code = None if other is None else icd.name_of(other)
        wrong_title = None if other is None else icd.title_of(other)
        corpus.question(subject, f"Which ICD-10-CM code reports: {title}?", code, "desc->code", wrong_code)
        corpus.question(subject, f"What does ICD-10-CM code {code} report?", title, "code->desc", wrong_title)


def _ask_notes(corpus: Corpus, subject: Subject, nodes: list[Element]) -> None:
    for node in nodes:
        for tag, question in NOTES_ASKED.items():
            if found := icd.notes(node, tag):
                asked = question.format(code=icd.name_of(node), title=icd.title_of(node))
                # Some notes go on from the words "Code first" and so begin with a comma.
                corpus.question(subject, asked, "; ".join(note.lstrip(", ") for note in found), tag)


def _ask_billable(corpus: Corpus, subject: Subject, nodes: list[Element], rng: Random) -> None:
    for node in rng.sample(nodes, min(len(nodes), BILLABLE_ASKED)):
        code = icd.name_of(node)
        right, wrong = (COMPLETE, INCOMPLETE) if icd.tabular().is_billable(code) else (INCOMPLETE, COMPLETE)
        question = f"Can ICD-10-CM code {code} be submitted on a claim as it is?"
        corpus.question(subject, question, right, "billable", wrong)
