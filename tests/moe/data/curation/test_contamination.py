"""Contamination: a copied exam goes, in however many rows it stands; a phrase that everybody uses stays, and is
counted; what is too short is counted too."""

import json

import pytest

from moe.data.curation import contamination
from moe.data.curation import words as ws
from moe.data.curation.contamination import Index, Item
from moe.data.curation.settings import Decontaminate
from moe.errors import InputError


def decide(items, texts, **section):
    """What becomes of rows of these texts, and how many items are too short."""
    index, too_short = Index.build([Item("exam.jsonl", str(n), each) for n, each in enumerate(items)],
                                   Decontaminate(**section))
    found = {row: runs for row, text in enumerate(texts) if len(runs := index.found(ws.hashes(ws.words(text))))}
    return contamination.decide(found, index), too_short


def test_a_copied_item_goes_from_all_rows(sentences):
    """Each of its runs stands in more rows than a phrase may."""
    item = sentences("item", 40)
    texts = [f"{sentences(n)} {item} {sentences(-n)}" for n in range(30)]
    decision, _ = decide([(item,)], texts)
    assert decision.items == dict.fromkeys(range(30), 0) and decision.spared == 0 and decision.common_runs == 28


def test_a_phrase_stays_unless_it_is_half_of_an_item(sentences):
    phrase = sentences("phrase", 20).rstrip(".")  # 8 runs
    items = [(f"{phrase} {sentences('long', 40)}",), (f"{phrase} {sentences('short', 5)}",)]  # 48 and 13 runs
    texts = [f"{sentences(n)} {phrase} {sentences(-n)}" for n in range(11)]
    decision, _ = decide(items[:1], texts)
    assert decision.items == {} and decision.spared == 11 and decision.common_runs == 8
    decision, _ = decide(items, texts)
    assert decision.items == dict.fromkeys(range(11), 1)  # 8 of 13
    decision, _ = decide(items[:1], texts[:10])
    assert len(decision.items) == 10  # in so few rows it is no phrase
    decision, _ = decide(items[:1], texts, max_rows=None)
    assert len(decision.items) == 11


def test_a_share_is_that_of_one_text_of_an_item(sentences):
    """An item as it is and as de-identified has more runs than either."""
    words = sentences("item", 40).split()
    masked = [*words[:20], "[MRN]", *words[21:]]
    held = " ".join(masked[:27])  # 15 of its 28 runs, and of the 41 that both have
    decision, _ = decide([(" ".join(words), " ".join(masked))], [f"{sentences(n)} {held}" for n in range(11)])
    assert len(decision.items) == 11


def test_items_that_share_a_run_are_told_by_the_first(sentences):
    shared = sentences("shared", 13)
    items = [(sentences("other", 20),), (f"{shared} {sentences(1, 9)}",), (shared,)]
    decision, _ = decide(items, [shared])
    assert decision.items == {0: 1}


def test_an_item_is_looked_for_by_eight_words_or_not_at_all(sentences):
    items = [(sentences("eight", 8),), (sentences("seven", 7),), ("",)]
    decision, too_short = decide(items, [f"{sentences(1)} {each[0]} {sentences(2)}" for each in items])
    assert decision.items == {0: 0} and too_short == 2


def test_no_items_are_found_nowhere(sentences):
    decision, too_short = decide([], [sentences(1)])
    assert decision == ({}, 0, 0) and too_short == 0


def test_an_index_is_the_same_in_another_process(sentences, tmp_path):
    section = Decontaminate()
    items = [Item("exam.jsonl", "1", (sentences(1),)), Item("exam.jsonl", "2", (sentences(2, 9),))]
    index, _ = Index.build(items, section)
    index.save(tmp_path)
    hashes = ws.hashes(ws.words(f"{sentences(2, 9)} {sentences(1)}"))
    assert index.found(hashes).tolist() == Index.load(tmp_path, section).found(hashes).tolist() == [*range(50)]


def test_items_are_read_as_they_are_and_as_de_identified(tmp_path):
    path = tmp_path / "exam.jsonl"
    rows = [{"id": 0, "prompt": "a MRN", "completion": " b"}, {"question": "c", "answer": "d"}, {"text": "e \ud800"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def deidentify(text):
        return text.replace("MRN", "[MRN]"), {}

    assert [*contamination.read(path, deidentify)] == [
        Item("exam.jsonl", "0", ("a MRN  b", "a [MRN]  b")), Item("exam.jsonl", "row 2", ("c d",)),
        Item("exam.jsonl", "row 3", ("e ?",)),
    ]  # fmt: skip
    path.write_text('{"answer": "Olga Haddad"}\n')
    with pytest.raises(InputError, match="row 1 has no text to look for") as caught:
        [*contamination.read(path, None)]
    assert "Olga" not in str(caught.value)
