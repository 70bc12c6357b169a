"""The grammar: draw an exam and a few findings, and state them in a report.

Every finding that the text states gets a label: present, absent or uncertain, with side, location and size.
What is not stated gets none. Findings are drawn independently: that some occur together, or at some ages, is
not modelled. The reports describe no real person and are not for clinical use.
"""

import re
from dataclasses import dataclass
from random import Random

from moe.data.demonstration.reports import abdomen, chest, head_and_spine, limbs_neck_breast
from moe.data.demonstration.reports.exams import EXAMS, Exam
from moe.data.demonstration.reports.finding import Finding

FINDINGS = (*chest.FINDINGS, *abdomen.FINDINGS, *head_and_spine.FINDINGS, *limbs_neck_breast.FINDINGS)

SIDES = ("right", "left")
NUM_POSITIVE = {0: 15, 1: 40, 2: 30, 3: 15}  # weights
MOST_NEGATIVE = 4
UNCERTAIN_SHARE = 0.22
ADVICE_SHARE = 0.7

HEDGES = (
    "Findings are suspicious for {a_phrase}, although not definitive.",
    "Possible {phrase}; the appearance is equivocal on this study.",
    "{A_phrase} cannot be excluded.",
    "There is questionable {phrase}, limited by motion.",
)
UNSURE_ADVICE = (
    "Further evaluation is advised.",
    "Correlation with symptoms is advised.",
    "Repeat imaging may help.",
)
DENIALS = ("No {name}.", "There is no {name}.", "No evidence of {name}.")
SINGULAR_DENIALS = (*DENIALS, "{Name} is not seen.")
NOTHING_FOUND = ("No acute abnormality.", "Normal study.", "No acute finding.")
VIEWS = ("PA and lateral", "Single frontal")
EARLIER = ("two days", "three weeks", "six months", "one year", "two years")
CHANGES = (
    "This is new from the prior study.",
    "This is unchanged from the prior study.",
    "This has increased since the prior study.",
)


@dataclass(frozen=True)
class Label:
    """What a report states about one finding. An absent finding has no further fields."""

    status: str  # present, absent or uncertain
    region: str
    phrase: str
    side: str = ""
    location: str = ""
    size: str = ""  # as written, in mm or cm
    size_mm: int | None = None
    plain: str = ""
    code: str = ""


@dataclass(frozen=True)
class Report:
    exam: Exam
    head: str  # everything up to and including the findings
    impression: str
    labels: dict[str, Label]  # by name of the finding

    @property
    def text(self) -> str:
        return f"{self.head}\nIMPRESSION:\n{self.impression}"


@dataclass(frozen=True)
class Statement:
    """A finding as one report states it."""

    finding: Finding
    label: Label
    sentence: str  # for the findings section
    conclusion: str  # for the impression


def make_report(rng: Random) -> Report:
    exam = rng.choices(EXAMS, weights=[exam.weight for exam in EXAMS])[0]
    side = rng.choice(SIDES)
    pool = [finding for finding in FINDINGS if exam.key in finding.exams.split()]
    rng.shuffle(pool)
    num_positive = rng.choices(list(NUM_POSITIVE), weights=list(NUM_POSITIVE.values()))[0]
    positive = [_state(f, side if exam.one_sided else rng.choice(SIDES), rng) for f in pool[:num_positive]]
    negative = _denials(pool[num_positive:], {s.finding.region for s in positive}, rng)

    comparison, change = _comparison(any(s.label.status == "present" for s in positive), rng)
    head = _heading(exam, side, positive + negative, comparison, rng)
    findings = _findings_section(exam, positive, negative, rng)
    return Report(
        exam,
        head=f"{head}\nFINDINGS:\n{findings}",
        impression=_impression(positive, negative, change, rng),
        labels={s.finding.name: s.label for s in positive + negative},
    )


def _state(finding: Finding, side: str, rng: Random) -> Statement:
    """State a finding as present, or with a hedge as uncertain."""
    side = side if finding.sided else ""
    locations = finding.locations_on(side)
    size_mm, size = _size(finding, rng)
    slots = {
        "side": side,
        "loc": rng.choice(locations) if locations else "",
        "deg": rng.choice(finding.degrees) if finding.degrees else "",
        "size": size,
    }
    phrase = finding.phrase.format(**slots)
    with_article = phrase if finding.noun != "single" else f"{_article(phrase)} {phrase}"
    if rng.random() < UNCERTAIN_SHARE:
        status = "uncertain"
        words = {"phrase": phrase, "a_phrase": with_article, "A_phrase": _capital(with_article)}
        sentence = rng.choice(HEDGES).format(**words)
        conclusion = f"Possible {phrase}. {rng.choice(UNSURE_ADVICE)}"
    else:
        status = "present"
        observation = finding.observation.format(**slots)
        verb = "are" if finding.noun == "plural" else "is"
        sentence = rng.choice((observation, observation, f"There {verb} {with_article}."))
        conclusion = _capital(phrase) + "."
        if finding.advice and rng.random() < ADVICE_SHARE:
            conclusion += " " + finding.advice
    plain, code = finding.plain.format(side=side), finding.code_for(side)
    label = Label(status, finding.region, phrase, side, slots["loc"], size, size_mm, plain, code)
    return Statement(finding, label, sentence, conclusion)


def _size(finding: Finding, rng: Random) -> tuple[int | None, str]:
    if finding.size_mm is None:
        return None, ""
    mm = rng.randint(*finding.size_mm)
    return mm, f"{mm} mm" if mm < 10 or rng.random() < 0.5 else f"{mm / 10:.1f} cm"


def _denials(pool: list[Finding], touched: set[str], rng: Random) -> list[Statement]:
    """State up to four findings as absent, less often in a region that has something present."""
    out = []
    for finding in pool[: rng.randint(1, MOST_NEGATIVE)]:
        if finding.region in touched and rng.random() < 0.3:
            continue
        frames = DENIALS if finding.noun == "plural" else SINGULAR_DENIALS
        sentence = rng.choice(frames).format(name=finding.name, Name=_capital(finding.name))
        label = Label("absent", finding.region, finding.name)
        out.append(Statement(finding, label, sentence, f"No {finding.name}."))
    return out


def _comparison(any_present: bool, rng: Random) -> tuple[str, str]:
    """The comparison line, and what to say about change in the impression, if anything."""
    comparison = rng.choice(("None.", "None available.", f"Prior study from {rng.choice(EARLIER)} earlier."))
    if comparison.startswith("Prior") and any_present and rng.random() < 0.5:
        return comparison, rng.choice(CHANGES)
    return comparison, ""


def _heading(exam: Exam, side: str, statements: list[Statement], comparison: str, rng: Random) -> str:
    view = rng.choice(VIEWS)
    female = exam.key == "mammo" or any(s.finding.name == "ovarian cyst" for s in statements)
    patient = f"{rng.randint(*exam.ages)}-year-old {'woman' if female else rng.choice(('man', 'woman'))}"
    reason = rng.choice(exam.indications)
    # Symptoms follow "with"; an occasion such as "preoperative evaluation" does not.
    joint = "," if reason.startswith(("pre", "follow", "screen", "recall")) else " with"
    lines = [
        "EXAMINATION: " + exam.title.format(SIDE=side.upper(), view=view.upper()),
        f"INDICATION: {patient}{joint} {reason}.",
        "TECHNIQUE: " + rng.choice(exam.techniques).format(side=side, view=view),
        "COMPARISON: " + comparison,
    ]
    return "\n".join(lines)


def _findings_section(exam: Exam, positive: list[Statement], negative: list[Statement], rng: Random) -> str:
    """One paragraph for each region: what is present, else its normal sentence; then what is absent."""
    paragraphs, headed = [], rng.random() < 0.6
    for region, normal in exam.normal.items():
        present = [s.sentence for s in positive if s.finding.region == region]
        absent = [s.sentence for s in negative if s.finding.region == region]
        if not present and not (exam.normals_deny and absent):
            present = [normal]
        paragraphs.append((f"{region}: " if headed else "") + " ".join(present + absent))
    return ("\n" if headed else " ").join(paragraphs)


def _impression(positive: list[Statement], negative: list[Statement], change: str, rng: Random) -> str:
    """What is present, what is possible, and perhaps one denial; numbered where there are several."""
    present = [s.conclusion for s in positive if s.label.status == "present"]
    if change:
        present[0] += " " + change
    lines = present + [s.conclusion for s in positive if s.label.status == "uncertain"]
    denial = negative[0].conclusion if negative else ""
    if not lines:
        return f"{rng.choice(NOTHING_FOUND)} {denial}".strip()
    if denial and rng.random() < 0.4:
        lines.append(denial)
    return lines[0] if len(lines) == 1 else "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def flip_side(text: str) -> str:
    """Swap right and left, keeping the case."""
    swap = {"right": "left", "Right": "Left", "RIGHT": "LEFT"}
    swap |= {left: right for right, left in swap.items()}
    return re.sub(rf"\b(?:{'|'.join(swap)})\b", lambda found: swap[found[0]], text)


def _article(phrase: str) -> str:
    """`an` before a vowel sound; numbers and vertebral levels are read aloud (an 8 mm, an L4-L5)."""
    return "an" if re.match(r"[aeiou]|L\d|8\b|1[18] ", phrase) else "a"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
