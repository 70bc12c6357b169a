"""Four groups judge the same pair of answers, and differ although no answer contradicts the facts.

    score(group, text) = sum over features of weight[group][feature] * min(count, 2)

The score is a rule on the text alone, so it can also serve as a reward. It is kept as simple as it looks: it
measures the mechanics of aligning to several groups, not what real clinicians, patients, payers or educators
want. Word count and word length are not capped at 2. A pair that a group likes alike is left out.
"""

import hashlib
import re
from collections.abc import Mapping

from moe.config import STAKEHOLDERS
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Corpus, Subject, as_prompt

STYLES = ("coded", "plain", "precise", "reasoned")

PATTERNS = {
    "you": re.compile(r"\byour?\b", re.IGNORECASE),
    "code": re.compile(r"\b[A-Z]\d[0-9A-Z](?:\.[0-9A-Z]{1,4})?\b"),
    "paperwork": re.compile(r"document|record|claim|corrected|billed", re.IGNORECASE),
    "reason": re.compile(r"\bbecause\b|\btherefore\b", re.IGNORECASE),
    "side": re.compile(r"\bright\b|\bleft\b", re.IGNORECASE),
    "measurement": re.compile(r"\d+(?:\.\d)? ?(?:mm|cm)\b"),
    "hedge": re.compile(
        r"possible|equivocal|probable|cannot|uncertain|confirm|not clear|definite", re.IGNORECASE
    ),
}
MOST_COUNTED = 2  # more of the same is not better

WEIGHTS = {
    "clinician": dict(side=2, measurement=2, hedge=2.5, you=-2, paperwork=-0.5, words=-0.03),
    "patient": dict(you=2.5, code=-2, word_length=-1.2, measurement=-0.5, reason=-0.5),
    "payer": dict(code=2.5, paperwork=2, you=-1.5, words=-0.02),
    "educator": dict(reason=3, hedge=1, side=0.5, words=0.02, you=-1),
}


def features(text: str) -> dict[str, float]:
    """What the score counts in a text."""
    words = re.findall(r"[A-Za-z]+", text)
    counts: dict[str, float] = {
        name: min(len(pattern.findall(text)), MOST_COUNTED) for name, pattern in PATTERNS.items()
    }
    return counts | {"words": len(words), "word_length": sum(map(len, words)) / max(1, len(words))}


def stakeholder_score(group: str, text: str) -> float:
    """How much a group likes an answer; only differences mean anything."""
    found = features(text)
    return sum(weight * found[name] for name, weight in WEIGHTS[group].items())


def judge(corpus: Corpus, chance: Chance, subject: Subject, prompt: str, answers: Mapping[str, str]) -> None:
    """Draw two of the four answers and add what each group prefers: four rows that share `pair_id`.

    `agreement` is the share of the larger side: 0.5, 0.75 or 1.
    """
    assert sorted(answers) == list(STYLES), sorted(answers)
    first, second = chance.rng("pair", subject.concept, prompt).sample(STYLES, 2)
    margin = {
        group: stakeholder_score(group, answers[first]) - stakeholder_score(group, answers[second])
        for group in STAKEHOLDERS
    }
    if not all(margin.values()):
        corpus.dropped["preferences"]["a group likes both answers alike"] += 1
        return
    likes_first = {group: margin[group] > 0 for group in STAKEHOLDERS}
    votes = sum(likes_first.values())
    pair = hashlib.sha256("\x00".join([as_prompt(prompt), first, second]).encode()).hexdigest()[:16]
    for group in STAKEHOLDERS:
        win, lose = (first, second) if likes_first[group] else (second, first)
        corpus.preference(
            subject, prompt, answers[win], answers[lose], f"style:{win}>{lose}", group,
            pair_id=pair, agreement=max(votes, len(STAKEHOLDERS) - votes) / len(STAKEHOLDERS),
        )  # fmt: skip
