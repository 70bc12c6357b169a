"""Is a text worth training on? Rules of Gopher, which look at lengths, letters and repetition, and one on damage.

    reason(text, section)   None, or the code of the first rule that it breaks

A code is all that is recorded of a row that goes. Shares of characters count those of words, not what stands between.
"""

from collections import Counter

import numpy as np
import regex

from moe.data.curation import words as ws
from moe.data.curation.settings import Filter

# UTF-8 that was read as Latin-1 or Windows-1252: the two bytes of a letter, or the three of a quotation mark or a dash.
_MISREAD = r"[ÂÃ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹Œ‘’“”•–—˜™š›œ]|â€."
_DAMAGE = regex.compile(rf"[\ufffd\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]|{_MISREAD}")
_LETTER = regex.compile(r"\p{L}")
PHRASE, RUN = (2, 3, 4), 10  # words


def reason(text: str, section: Filter) -> str | None:
    """`empty`, `too_short`, `too_long`, `damaged_characters`, `word_length`, `few_letters`, `repeated_lines`,
    `repeated_phrase` or `repeated_runs`."""
    if not text.strip():
        return "empty"
    if len(_DAMAGE.findall(text)) > section.max_damage * len(text):
        return "damaged_characters"
    words = ws.words(text)
    if len(words) < section.min_words:
        return "too_short"
    if len(words) > section.max_words:
        return "too_long"
    if words:
        shortest, longest = section.mean_word_length
        if not shortest <= sum(map(len, words)) / len(words) <= longest:
            return "word_length"
        if sum(bool(_LETTER.search(word)) for word in words) < section.min_letter_share * len(words):
            return "few_letters"
    return _repetition(text, words, section) if len(words) >= section.min_words_for_repetition else None


def _repetition(text: str, words: list[str], section: Filter) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    again = [line for line, count in Counter(lines).items() for _ in range(count - 1)]
    for of in (len, lambda group: sum(map(len, group))):
        if of(again) > section.max_repeated_lines * of(lines):
            return "repeated_lines"
    hashes, lengths = ws.hashes(words), np.array([len(word) for word in words])
    starts = np.concatenate([[0], np.cumsum(lengths)])  # of each word, in characters
    for n in PHRASE:
        if n > len(words):
            break
        _, first, count = np.unique(ws.runs(hashes, n), return_index=True, return_counts=True)
        characters = starts[first + n] - starts[first]
        commonest = np.lexsort((characters, count))[-1]  # and the longest of those that are as common
        covered = count[commonest] * characters[commonest]
        if count[commonest] > 1 and covered > section.max_commonest_phrase * starts[-1]:
            return "repeated_phrase"
    runs = ws.runs(hashes, RUN)
    _, first = np.unique(runs, return_index=True)
    again = np.setdiff1d(np.arange(len(runs)), first)
    inside = np.zeros(len(words) + 1, np.int64)  # +1 where a run that stood before begins, -1 where it has ended
    np.add.at(inside, again, 1)
    np.add.at(inside, again + RUN, -1)
    if lengths[np.cumsum(inside)[:-1] > 0].sum() > section.max_repeated_runs * starts[-1]:
        return "repeated_runs"
    return None
