"""Which topics and tasks a capped corpus keeps: an even sample, the same for the same seed.

Rules
  documents    Topics are taken in a shuffled order that ignores their side of the split, so the evaluation
               side shrinks in proportion. The cap counts training characters and is never passed: a topic
               that does not fit is left out, and the walk ends at the first such once nine tenths are full.
  qa and       At most one row for each 175 characters of the cap (8,000 rows at 1.4 million), shared evenly
  preferences  over kinds. The four rows of one stakeholder pair are kept or left out together.
"""

import collections
from collections.abc import Iterable

from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Document, Row, Topic

CHARACTERS_PER_TASK = 175
FULL_ENOUGH = 0.9


def choose(
    topics: Iterable[Topic], chance: Chance, max_characters: int | None
) -> list[tuple[Topic, list[Document]]]:
    """The topics to keep, in shuffled order, with their documents; the rest is never rendered."""
    chosen, used = [], 0
    for topic in sorted(topics, key=lambda topic: chance.order(topic.key)):
        documents = topic.documents()
        size = sum(len(d.text) for d in documents if d.subject.split != "eval")
        if max_characters is not None and used + size > max_characters:
            if used >= FULL_ENOUGH * max_characters:
                break
            continue
        used += size
        chosen.append((topic, documents))
    return chosen


def thin_out(
    rows: list[tuple[str, Row]], chance: Chance, max_characters: int | None
) -> list[tuple[str, Row]]:
    """The rows of a table of tasks that a cap leaves, shared evenly over kinds."""
    if max_characters is None:
        return rows
    kinds: dict[str, dict[str, list]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for split, row in rows:
        unit = str(row.get("pair_id", row["id"]))
        kinds[str(row["kind"]).split(":")[0]][unit].append((split, row))

    # Small kinds first: what they do not use of their share goes to the larger ones.
    # A kind whose units have four rows stands for four kinds, one for each stakeholder group.
    width = {kind: max(map(len, units.values())) for kind, units in kinds.items()}
    kept, room, shares = [], max_characters // CHARACTERS_PER_TASK, sum(width.values())
    for kind in sorted(kinds, key=lambda kind: (len(kinds[kind]), kind)):
        units = kinds[kind]
        num_units = room // shares
        for unit in sorted(units, key=chance.order)[:num_units]:
            kept += units[unit]
            room -= len(units[unit])
        shares -= width[kind]
    return kept
