"""Made-up medicine list checks: what is continued, stopped, new, ordered twice, or against an allergy.

The facts (two names of one substance, a shared MeSH class) come from the drug table. Medicines are drawn from
the note's own side of the split. No dose, strength or advice on treatment is written; not for clinical use.
"""

import collections
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from moe.data.demonstration import stakeholders
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Corpus, Document, Subject, Topic
from moe.data.demonstration.drugs import PACKAGE, Drug, capital, drugs

NUM_BEFORE, MOST_NEW = (3, 6), 2
STOPPED_SHARE, BRAND_SHARE, DUPLICATE_SHARE = 0.65, 0.45, 0.4
ALLERGY_SHARE, CONFLICT_SHARE = 0.45, 0.7  # of notes; of notes with an allergy, where one is possible

SETTINGS = (
    "admission to a general medicine ward",
    "transfer from intensive care",
    "discharge to home",
    "admission to a surgical ward",
    "first visit to an outpatient clinic",
)
SOURCES = (
    "patient interview and community pharmacy record",
    "family member and discharge letter",
    "medicine packages brought from home",
    "electronic prescribing record",
)
REACTIONS = ("rash", "hives", "swelling of the lips", "reaction not recorded")
SCHEDULES = (
    "as prescribed",
    "as prescribed before admission",
    "per order set",
    "schedule per prescriber",
    "route and strength per order",
)
REASONS = (
    "course completed",
    "stopped by the patient before admission",
    "held before a procedure",
    "prescriber chose another treatment",
)
NO_DUPLICATE = "no substance is ordered twice"
NO_CONFLICT = "no order shares a listed class with a recorded allergy"


@dataclass(frozen=True)
class Conflict:
    """An order that shares a class with a drug to which an allergy is recorded."""

    order: Drug
    allergy: Drug
    shared: str


@dataclass(frozen=True)
class Note:
    text: str  # without the pharmacist's summary
    entries: list[str]  # the orders as written
    before: list[Drug]
    stopped: dict[Drug, str]  # with the reason
    new: list[Drug]
    duplicate: tuple[Drug, str] | None  # and the second name under which it is ordered
    allergy: Drug | None
    conflict: Conflict | None

    @property
    def duplicate_check(self) -> str:
        if self.duplicate is None:
            return NO_DUPLICATE
        drug, name = self.duplicate
        return f"{name} and {drug.name} name the same substance and one order should be removed"

    @property
    def allergy_check(self) -> str:
        if self.conflict is None:
            return NO_CONFLICT
        order, allergy = self.conflict.order.name, self.conflict.allergy.name
        return (
            f"{order} shares the class {self.conflict.shared} with {allergy}, to which an allergy is "
            "recorded; a prescriber must decide"
        )

    @property
    def summary(self) -> str:
        continued = [drug for drug in self.before if drug not in self.stopped]
        parts = [f"Continued: {_names(continued)}." if continued else "Nothing is continued."]
        if self.stopped:
            listed = "; ".join(f"{drug.name} ({reason})" for drug, reason in self.stopped.items())
            parts.append(f"Not ordered: {listed}.")
        if self.new:
            parts.append(f"New: {_names(self.new)}.")
        parts.append(f"Duplicate check: {self.duplicate_check}. Allergy check: {self.allergy_check}.")
        return "Pharmacist summary: " + " ".join(parts)


def topics(chance: Chance, num_notes: int) -> list[Topic]:
    cupboards = {side: Cupboard(side, chance) for side in ("train", "eval")}
    return [_topic(number, cupboards, chance) for number in range(num_notes)]


class Cupboard:
    """The medicines that a note of one side may draw, and which of them share a class."""

    def __init__(self, side: str, chance: Chance) -> None:
        # Closed-book drugs are in neither cupboard: a note would give their questions away.
        self.drugs = [
            drug
            for drug in drugs()
            if drug.in_use and drug.synonyms and " " not in drug.key and chance.split(drug.concept) == side
        ]
        self.members = collections.defaultdict(list)
        for drug in self.drugs:
            for name in drug.classes:
                self.members[name].append(drug)

    def conflicts(self, orders: list[Drug], taken: list[Drug]) -> list[Conflict]:
        """Allergies that would meet exactly one of these orders, to drugs that the note does not name."""
        return [
            Conflict(order, allergy, shared)
            for order in orders
            for shared in order.classes
            for allergy in self.members[shared]
            if allergy not in taken and not any(share_class(allergy, o) for o in orders if o is not order)
        ]


def _topic(number: int, cupboards: dict[str, Cupboard], chance: Chance) -> Topic:
    concept = f"reconciliation:{number:06d}"
    subject = Subject(PACKAGE, concept, chance.side(concept))

    def make() -> Note:
        return make_note(cupboards[subject.split], number, chance.rng("reconciliation", number))

    def documents() -> list[Document]:
        note = make()
        return [Document(subject, f"{note.text}\n{note.summary}")]

    def tasks(corpus: Corpus) -> None:
        note = make()
        _ask(corpus, subject, note, chance.rng("reconciliation-tasks", number))
        if note.duplicate or note.conflict:
            prompt = note.text + "\nWhat should be done about these orders?"
            stakeholders.judge(corpus, chance, subject, prompt, _answers(note))

    return Topic(concept, documents, tasks)


def make_note(cupboard: Cupboard, number: int, rng: Random) -> Note:
    num_before, num_new = rng.randint(*NUM_BEFORE), rng.randint(0, MOST_NEW)
    picks = rng.sample(cupboard.drugs, num_before + num_new + 1)
    before, new, other = picks[:num_before], picks[num_before:-1], picks[-1]
    stopped = {before[0]: rng.choice(REASONS)} if rng.random() < STOPPED_SHARE else {}
    orders = [drug for drug in before if drug not in stopped] + new
    rng.shuffle(before)  # so that the stopped one is not always the first

    branded = next((drug for drug in orders if drug.brands), None) if rng.random() < DUPLICATE_SHARE else None
    entries = [drug.name if drug is branded else _shown(drug, rng) for drug in orders]
    duplicate = None
    if branded is not None:
        duplicate = branded, capital(rng.choice(branded.brands))
        entries.insert(rng.randrange(len(entries) + 1), duplicate[1])

    allergy, conflict = _allergy(cupboard, orders, before + new, other, rng)
    recorded = f"{allergy.name} ({rng.choice(REACTIONS)})" if allergy else "none known"
    lines = [
        f"MEDICATION RECONCILIATION {number:06d}",
        f"Setting: {rng.choice(SETTINGS)}.",
        f"Sources: {rng.choice(SOURCES)}.",
        f"Allergies: {recorded}.",
        "Medicines before:",
        *(f" - {_shown(drug, rng)}, {rng.choice(SCHEDULES)}" for drug in before),
        "Orders now:",
        *(f" - {entry}, {rng.choice(SCHEDULES)}" for entry in entries),
    ]
    return Note("\n".join(lines), entries, before, stopped, new, duplicate, allergy, conflict)


def _allergy(
    cupboard: Cupboard, orders: list[Drug], named: list[Drug], other: Drug, rng: Random
) -> tuple[Drug | None, Conflict | None]:
    """An allergy that meets one order, one that meets none, or no allergy."""
    if rng.random() >= ALLERGY_SHARE:
        return None, None
    conflicts = cupboard.conflicts(orders, named)
    if conflicts and rng.random() < CONFLICT_SHARE:
        conflict = rng.choice(conflicts)
        return conflict.allergy, conflict
    return (None if any(share_class(other, order) for order in orders) else other), None


def share_class(a: Drug, b: Drug) -> bool:
    return not set(a.classes).isdisjoint(b.classes)


def _shown(drug: Drug, rng: Random) -> str:
    """The generic name, or now and then a brand."""
    return capital(rng.choice(drug.brands)) if drug.brands and rng.random() < BRAND_SHARE else drug.name


def _ask(corpus: Corpus, subject: Subject, note: Note, rng: Random) -> None:
    def ask(question: str, answer: str, kind: str, wrong: str | None) -> None:
        corpus.question(subject, f"{note.text}\n{question}", answer, kind, wrong)

    if note.duplicate:
        wrong = capital(NO_DUPLICATE) + "."
    else:
        first, last = note.entries[0], note.entries[-1]
        wrong = f"{first} and {last} name the same substance and one order should be removed."
    ask("Is any substance ordered twice?", capital(note.duplicate_check) + ".", "note->duplicate", wrong)
    if note.allergy:
        if note.conflict:
            wrong = capital(NO_CONFLICT) + "."
        else:
            wrong = f"{note.entries[0]} shares a class with {note.allergy.name}."
        question = "Does an order need a check against the recorded allergy?"
        ask(question, capital(note.allergy_check) + ".", "note->allergy", wrong)
    if note.stopped:
        wrong = rng.choice([drug for drug in note.before if drug not in note.stopped]).name
        ask("Which medicine from before is not ordered now?", _names(note.stopped), "note->omitted", wrong)
    if note.new:
        ask("Which ordered medicines are new?", _names(note.new), "note->new", note.before[0].name)


def _answers(note: Note) -> dict[str, str]:
    """What to do, for four readers. The stock phrases are not proved by the note."""
    if note.duplicate:
        drug, check = note.duplicate[0].name, capital(note.duplicate_check)
        plain = (
            "Two of your medicines have different names but are the same thing. Your pharmacist will check "
            "with your doctor so that you only take one."
        )
    else:
        drug, check = note.conflict.order.name, capital(note.allergy_check)
        plain = (
            "One of your medicines is like one that you reacted to. Your pharmacist will ask your doctor "
            "before you take it."
        )
    return {
        "precise": f"{check}. Possible error in transcription; confirm with the prescriber before removal.",
        "plain": plain,
        "coded": f"Documentation for the claim: order entry for {drug} flagged, prescriber decision "
        "recorded, removed order not dispensed and not billed.",
        "reasoned": "The check compares substances and not printed names, because one substance has many "
        f"names. {check}; therefore {drug} needs a decision first.",
    }


def _names(listed: Iterable[Drug]) -> str:
    return ", ".join(drug.name for drug in listed)
