"""Made-up claim reviews. Every determination follows from the tabular list and the code list.

A claim is accepted, or returned for one of two faults: two codes that an Excludes1 note keeps apart, or a
heading in the place of a complete code. Codes come from the claim's own side of the split only.
"""

import collections
from dataclasses import dataclass
from random import Random

from moe.data.demonstration import icd, payment_groups, stakeholders
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Corpus, Document, Subject, Topic

FAULTS = {"none": 40, "excludes1": 35, "incomplete": 25}  # weights
NOT_DRAWN = "VWXY"  # external causes: never the reason for a visit
MOST_TARGETS = 3  # an Excludes1 note that names more is too broad to make a clear case

SETTINGS = {
    "Outpatient professional claim": ("follow-up visit", "new patient visit", "annual visit"),
    "Hospital outpatient claim": ("emergency visit", "ambulatory procedure", "observation"),
    "Inpatient facility claim": ("stay of two days", "stay of three days", "stay of six days"),
}
PLANS = ("commercial", "Medicare Advantage", "Medicaid managed care", "employer self-funded")
ACTIONS = {
    "none": "No action is needed.",
    "excludes1": "Review the record, keep the code that the documentation supports and resubmit.",
    "incomplete": "Select the complete code from the documentation and resubmit.",
}
ALL_WELL = "all diagnosis codes are complete and no Excludes1 rule applies between them"


@dataclass(frozen=True)
class Claim:
    body: str
    fault: str
    reason: str
    code: str  # the first as submitted; where there is a fault, the one it is about
    title: str

    @property
    def verdict(self) -> str:
        return "Accepted" if self.fault == "none" else "Returned"

    @property
    def text(self) -> str:
        return f"{self.body}\nDetermination: {self.verdict}. Reason: {self.reason}. {ACTIONS[self.fault]}"


def topics(chance: Chance, num_claims: int) -> list[Topic]:
    book = RuleBook(icd.tabular(), chance) if num_claims else None
    return [_topic(book, number, chance) for number in range(num_claims)]


def _topic(book: "RuleBook", number: int, chance: Chance) -> Topic:
    concept = f"claim:{number:06d}"
    subject = Subject(icd.PACKAGE, concept, chance.side(concept))

    def make() -> Claim:
        return make_claim(book, number, subject.split, chance.rng("claim", number))

    def documents() -> list[Document]:
        return [Document(subject, make().text)]

    def tasks(corpus: Corpus) -> None:
        claim = make()
        if claim.fault == "none":
            wrong = "Returned: an Excludes1 rule applies between the codes."
        else:
            wrong = f"Accepted: {ALL_WELL}."
        question = claim.body + "\nIs the claim accepted or returned, and why?"
        corpus.question(subject, question, f"{claim.verdict}: {claim.reason}.", "claim->decision", wrong)
        if claim.fault != "none":
            prompt = claim.body + "\nExplain what happened to this claim."
            stakeholders.judge(corpus, chance, subject, prompt, _answers(claim))

    return Topic(concept, documents, tasks)


class RuleBook:
    """Which codes a claim of each side may draw, and which may not stand together."""

    def __init__(self, tabular: icd.Tabular, chance: Chance) -> None:
        self.tabular = tabular
        self.codes = collections.defaultdict(list)  # category -> billable codes
        for code in sorted(tabular.billable):
            if code[0] not in NOT_DRAWN and tabular.describe(code):
                self.codes[code[:3]].append(code)
        # Closed-book categories are in neither pool: a claim would give their questions away.
        split = {category: chance.split(f"icd10cm:{category}") for category in self.codes}
        self.categories = {side: [c for c in self.codes if split[c] == side] for side in ("train", "eval")}
        self._excluded = collections.defaultdict(list)  # stem -> stems
        self.clashes = collections.defaultdict(list)  # side -> (stem, stem, note)
        for rule in tabular.exclusions():
            self._excluded[rule.stem] += rule.targets
            side = split.get(rule.stem[:3])
            for target in rule.targets:
                if (
                    len(rule.targets) <= MOST_TARGETS
                    and side is not None
                    and split.get(target[:3]) == side
                    and target[:3] != rule.stem[:3]
                    and rule.stem in tabular.billable_below
                    and target in tabular.billable_below
                ):
                    self.clashes[side].append((rule.stem, target, rule.note))

    def draw(self, side: str, rng: Random) -> list[str]:
        """Two to four codes of different categories between which no Excludes1 rule applies."""
        while True:
            categories = rng.sample(self.categories[side], rng.randint(2, 4))
            codes = [rng.choice(self.codes[category]) for category in categories]
            if not self.num_conflicts(codes):
                return codes

    def num_conflicts(self, codes: list[str]) -> int:
        """How many ordered pairs of these codes an Excludes1 rule keeps apart."""
        return sum(self._excludes(a, b) for a in codes for b in codes if a != b)

    def _excludes(self, code: str, other: str) -> bool:
        stems = (code[:i] for i in range(3, len(code) + 1))
        return any(other.startswith(target) for stem in stems for target in self._excluded.get(stem, ()))


def make_claim(book: RuleBook, number: int, side: str, rng: Random) -> Claim:
    codes = book.draw(side, rng)
    fault = rng.choices(list(FAULTS), weights=list(FAULTS.values()))[0]
    reason = ALL_WELL
    if fault == "excludes1":
        codes, reason = _with_clash(book, codes, side, rng)
    elif fault == "incomplete":
        if len(codes[0]) == 3:  # the category itself is billable: nothing to leave out
            fault = "none"
        else:
            codes, reason = _with_heading(book.tabular, codes)

    claim_type = rng.choice(list(SETTINGS))
    lines = [
        f"CLAIM REVIEW {number:06d}",
        f"Claim type: {claim_type}. Plan: {rng.choice(PLANS)}.",
        f"Encounter: {rng.choice(SETTINGS[claim_type])}.",
        "Diagnoses as submitted:",
        *(f" {n}. {_described(book.tabular, code)}" for n, code in enumerate(codes, 1)),
    ]
    return Claim("\n".join(lines), fault, reason, icd.dotted(codes[0]), book.tabular.describe(codes[0]))


def _with_clash(book: RuleBook, codes: list[str], side: str, rng: Random) -> tuple[list[str], str]:
    """Put two codes first that one rule keeps apart; of the rest keep those that add no other conflict."""
    stem, target, note = rng.choice(book.clashes[side])
    pair = [rng.choice(book.tabular.billable_below[s]) for s in (stem, target)]
    rest = [c for c in codes[2:] if book.num_conflicts([*pair, c]) == book.num_conflicts(pair)]
    first, second = map(icd.dotted, pair)
    reason = (
        f"{first} and {second} may not be reported together, because {icd.dotted(stem)} lists under "
        f"Excludes1: {note}"
    )
    return pair + rest, reason


def _with_heading(tabular: icd.Tabular, codes: list[str]) -> tuple[list[str], str]:
    """Shorten the first code to a heading above it."""
    full = codes[0]
    heading = full[:-1].rstrip("X")
    if len(heading) < 4 or heading in tabular.billable or heading not in tabular.codes:
        heading = full[:3]
    reason = (
        f"{icd.dotted(heading)} is a heading and not a complete code; a longer code such as "
        f"{icd.dotted(full)} is needed"
    )
    return [heading, *codes[1:]], reason


def _described(tabular: icd.Tabular, code: str) -> str:
    line = f"{icd.dotted(code)} {tabular.describe(code)}"
    category = payment_groups.risk_category().get(code)
    return f"{line} [risk category: {category}]" if category else line


def _answers(claim: Claim) -> dict[str, str]:
    """The same determination for four readers. The stock phrases are not proved by the claim."""
    fault = "conflict" if claim.fault == "excludes1" else "short code"
    return {
        "precise": f"Returned. Affected diagnosis: {claim.code}, {claim.title}; the remaining diagnoses "
        f"stand. The {fault} is probable data entry and cannot be settled without the record.",
        "plain": "Your claim was sent back because of how it was written up, not because of your care. The "
        "clinic can fix it and send it again, and you do not need to do anything yet.",
        "coded": f"Returned on {claim.code}: {claim.reason}. Documentation to attach: the signed visit note "
        "that supports the code kept. Corrected claim required.",
        "reasoned": "The claim was returned because the coding rules are read line by line: "
        f"{claim.reason}. Therefore one line has to change before the rest can be paid.",
    }
