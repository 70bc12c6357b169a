"""Curation: what identifies a person goes, what is no text, said before or part of an evaluation goes, and of every row
there is an account without its text."""

import json
import random
from collections import Counter

import pytest

from moe.data import files
from moe.data.curation.curation import curate
from moe.data.curation.settings import Settings, load
from moe.errors import InputError

pytest.importorskip("presidio_analyzer", reason="wants the extra curate: pip install -e '.[curate]'")

# Type, what stands around the value, the value. Each must go whole; what stands around it must stay.
IDENTIFIERS = [
    ("NAME", "Patient: {}. ", "Olga Haddad"), ("NAME", "Seen by Dr. {} today. ", "O'Brien"),
    ("NAME", "PATIENT NAME: {}\n", "NGUYEN, WEI"), ("ADDRESS", "Lives at {} alone. ", "1204 Maple Hill Avenue"),
    ("ZIP", "ZIP code: {}. ", "61602"), ("DATE", "Admitted {}. ", "03/14/2021"),
    ("DATE", "DOB: {}. ", "7 June 1948"), ("DATE", "Follow-up CT on {} shows no change. ", "Mar 3, 2022"),
    ("AGE", "{}-year-old woman. ", "93"), ("PHONE", "Call {} with questions. ", "(312) 555-0142"),
    ("FAX", "Fax: {}. ", "312-555-0143"), ("EMAIL", "Contact {}. ", "olga.33@mail.example.org"),
    ("SSN", "SSN: {}. ", "219-09-9999"), ("MRN", "MRN: {}. ", "00482913"),
    ("PLAN_ID", "Member ID: {}. ", "XQZ118273645"),
    ("ACCOUNT", "Account number: {}. ", "4482910377"), ("LICENCE", "DEA: {}. ", "BA1234563"),
    ("VEHICLE", "VIN: {}. ", "1HGCM82633A004352"), ("DEVICE", "Serial number: {}. ", "PJN384756H"),
    ("URL", "See {} for the images. ", "https://portal.example.org/view?id=88213"),
    ("IP", "Logged in from {}. ", "10.20.30.40"), ("ID", "Accession number: {}. ", "RAD20384756"),
]  # fmt: skip
PLAIN = [
    "The nodule measures 12 x 5 mm in the right upper lobe.", "Blood pressure 128/76, pulse 92, SpO2 97%.",
    "ICD-10-CM code J18.9, pneumonia, unspecified organism.", "Take metformin 500 mg twice daily with meals.",
    "A 64-year-old man with cough for 3 weeks.", "DICOM element (0010,0020), UID 1.2.840.10008.5.1.4.1.1.2.",
    "Give 1-2 tablets every 4-6 hours as needed.", "DRG 193, relative weight 1.3107, 4.2 days.",
]


def write(path, texts):
    rows = [{"id": f"row-{n}", "text": text, "licence": "CC0", "source": "made up"} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


NOTHING = dict(deidentify=None, filter=None, deduplicate=None, decontaminate=None)


def only(**sections):
    return Settings.model_validate(NOTHING | sections)


def test_every_kind_of_identifier_goes_and_nothing_else(tmp_path):
    rng = random.Random(4)
    texts = [f"{rng.choice(PLAIN)} {around.format(value)}{rng.choice(PLAIN)}" for _, around, value in IDENTIFIERS]
    manifest = curate([write(tmp_path / "notes.jsonl", texts)], tmp_path / "out", settings=only(deidentify={}))
    left = [row["text"] for row in read(tmp_path / "out/documents.jsonl")]
    for (kind, around, value), before, after in zip(IDENTIFIERS, texts, left, strict=True):
        assert after == before.replace(value, f"[{kind}]", 1), (kind, around)
    (step,) = [step for step in manifest["steps"] if step["step"] == "deidentify"]
    assert step["found"] == dict(sorted(Counter(kind for kind, *_ in IDENTIFIERS).items()))
    assert "names and places" in manifest["warnings"][0]  # in running text, which no pattern finds


def test_text_without_identifiers_stays_to_the_letter(tmp_path):
    curate([write(tmp_path / "notes.jsonl", PLAIN)], tmp_path / "out", settings=only(deidentify={}))
    assert [row["text"] for row in read(tmp_path / "out/documents.jsonl")] == PLAIN


def test_pseudonyms_are_those_of_the_key(tmp_path):
    texts = ["MRN: 00482913. Stable.", "Again MRN: 00482913. Stable.", "MRN: 00482914. Stable."]
    found = {}
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode() * 16)
        settings = only(deidentify={"key": tmp_path / name})
        curate([write(tmp_path / "notes.jsonl", texts)], tmp_path / f"out-{name}", settings=settings)
        rows = read(tmp_path / f"out-{name}/documents.jsonl")
        found[name] = [row["text"].split("[MRN ")[1].split("]")[0] for row in rows]
        assert name * 16 not in (tmp_path / f"out-{name}/manifest.json").read_text()
    first, again, other = found["one"]
    assert first == again != other and set(found["one"]).isdisjoint(found["two"])


@pytest.mark.parametrize("text, reason", [
    ("Too short.", "too_short"), ("1.1234 2.2345 3.3456 4.4567 " * 3, "few_letters"),
    ("same line here again\n" * 40, "repeated"), ("9 8 7 6 5 4 3 2 1 0 " * 8, "word_length"),
    ("broken \ufffd\ufffd\ufffd text of some words that would do otherwise", "damage"),
])  # fmt: skip
def test_what_is_no_text_goes(text, reason, tmp_path, sentences):
    path = write(tmp_path / "notes.jsonl", [sentences(1), text])
    manifest = curate([path], tmp_path / "out", settings=only(filter={}))
    assert manifest["rows"] == 1
    (change,) = read(tmp_path / "out/changes.jsonl")
    assert change["id"] == "row-1" and reason in change["reason"]


def test_the_first_of_equal_and_of_nearly_equal_rows_stays(tmp_path, sentences):
    long, words = sentences(1, 200), sentences(1, 200).split()
    words[100] = "otherwise"
    other = long.split()
    other[:120] = sentences(2, 120).split()
    texts = [long, sentences(3), long.upper(), " ".join(words), " ".join(other)]
    curate([write(tmp_path / "notes.jsonl", texts)], tmp_path / "out", settings=only(deduplicate={}))
    assert [row["id"] for row in read(tmp_path / "out/documents.jsonl")] == ["row-0", "row-1", "row-4"]
    exact, near = read(tmp_path / "out/changes.jsonl")
    assert (exact["id"], exact["reason"], exact["of"]["id"]) == ("row-2", "exact", "row-0")
    assert (near["id"], near["reason"], near["of"]["id"]) == ("row-3", "near", "row-0") and near["jaccard"] >= 0.8


def test_a_row_that_holds_a_piece_of_an_evaluation_goes(tmp_path, sentences):
    item = sentences("item", 20)
    texts = [sentences(1), f"{sentences(2)} {' '.join(item.split()[3:17])} {sentences(3)}",
             f"{sentences(4)} {' '.join(item.split()[3:12])} {sentences(5)}"]
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"id": "q-7", "prompt": item, "completion": " yes"}) + "\n")
    path = write(tmp_path / "notes.jsonl", texts)
    curate([path], tmp_path / "out", [exam], only(decontaminate={}))
    assert [row["id"] for row in read(tmp_path / "out/documents.jsonl")] == ["row-0", "row-2"]  # 9 words are too few
    (change,) = read(tmp_path / "out/changes.jsonl")
    assert (change["id"], change["item"]) == ("row-1", "q-7")


def test_an_exam_is_looked_for_as_de_identified_too(tmp_path, sentences):
    """What is left of a copy has no other run of the exam than one with the placeholder in it."""
    start, end = sentences(1, 10).rstrip("."), sentences(2, 10)
    item = f"{start} MRN: 00482913 {end}"
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"text": item}) + "\n")
    path = write(tmp_path / "notes.jsonl", [f"{sentences(3)} {item} {sentences(4)}", sentences(5)])
    curate([path], tmp_path / "out", [exam], only(deidentify={}, decontaminate={}))
    assert [row["id"] for row in read(tmp_path / "out/documents.jsonl")] == ["row-1"]


def test_what_may_be_left_of_an_evaluation_is_told(tmp_path, sentences):
    phrase = sentences("phrase", 14)
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(json.dumps({"text": text}) + "\n" for text in (f"{phrase} {sentences(0)}", "Too short.")))
    path = write(tmp_path / "notes.jsonl", [f"{sentences(n)} {phrase}" for n in range(1, 12)])
    manifest = curate([path], tmp_path / "out", [exam], only(decontaminate={}))
    assert manifest["rows"] == 11 and manifest["steps"][-1]["spared"] == 11
    short, spared = manifest["warnings"][-2:]
    assert short == "evaluation items that were not looked for, because they have fewer than 8 words: 1"
    assert spared == ("rows that hold words of evaluation items and stay: 11, because more than 10 rows hold them, and "
                      "they are less than 50% of any item")
    assert phrase.split()[0] not in (tmp_path / "out/manifest.json").read_text()


def test_a_row_that_cannot_be_searched_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("presidio_analyzer.pattern_recognizer.REGEX_TIMEOUT_SECONDS", 1)
    path = write(tmp_path / "notes.jsonl", ["a" * 60 + " MRN: 00482913", "MRN: 00482914"])
    settings = only(deidentify={"patterns": {"MRN": "(?:a|a|aa)+b"}})
    curate([path], tmp_path / "out", settings=settings)
    assert [row["text"] for row in read(tmp_path / "out/documents.jsonl")] == ["MRN: [MRN]"]
    assert [change["reason"] for change in read(tmp_path / "out/changes.jsonl")[:1]] == ["too_hard_to_search"]


def test_texts_without_words_are_no_copies_of_each_other(tmp_path, sentences):
    path = write(tmp_path / "notes.jsonl", ["...", "!!!", sentences(1), "..."])
    curate([path], tmp_path / "out", settings=only(deduplicate={}))
    assert [row["id"] for row in read(tmp_path / "out/documents.jsonl")] == ["row-0", "row-1", "row-2"]


def test_a_word_is_no_repetition(tmp_path):
    path = write(tmp_path / "notes.jsonl", ["nodule", "two words", "three words here", "1", "again again again again"])
    rules = {"min_words_for_repetition": 1, "min_words": 0, "mean_word_length": [0, 100], "min_letter_share": 0}
    curate([path], tmp_path / "out", settings=only(filter=rules))
    (change,) = read(tmp_path / "out/changes.jsonl")
    assert change["id"] == "row-4" and change["reason"] == "repeated_phrase"


def test_the_same_bytes_by_one_process_and_by_two(tmp_path, sentences):
    texts = [f"{sentences(n)} MRN: {1000000 + n}. " for n in range(150)]
    path = write(tmp_path / "notes.jsonl", texts)
    lines = path.read_text().splitlines(keepends=True)
    for number in (3, 100, 149):
        lines[number] = json.dumps({"id": f"row-{number}", "text": None}) + "\n"
    lines[50] = json.dumps({"id": "row-50", "text": "Short."}) + "\n"
    path.write_text("".join(lines))
    for workers in (1, 2):
        curate([path], tmp_path / f"by-{workers}", workers=workers)
    for name in ("documents.jsonl", "changes.jsonl", "manifest.json"):
        assert (tmp_path / "by-1" / name).read_bytes() == (tmp_path / "by-2" / name).read_bytes()
    changes = [json.loads(line) for line in (tmp_path / "by-2/changes.jsonl").read_text().splitlines()]
    rows = [change["row"] for change in changes if change["step"] in ("read", "deidentify", "filter")]
    assert rows == sorted(rows) and {4, 51, 101, 150} <= {*rows}


def test_no_text_is_in_the_account(tmp_path, sentences):
    texts = [sentences(1), sentences(1), "Short.", f"{sentences(2)} MRN: 00482913."]
    curate([write(tmp_path / "notes.jsonl", texts)], tmp_path / "out")
    said = (tmp_path / "out/changes.jsonl").read_text() + (tmp_path / "out/manifest.json").read_text()
    assert "00482913" not in said and not any(word in said for text in texts for word in text.split() if len(word) > 7)


def test_parquet_in_parquet_out(tmp_path, sentences):
    with files.writer(tmp_path / "notes.parquet", ("id", "text")) as put:
        for n in range(5):
            put({"id": str(n), "text": sentences(n)})
    curate([tmp_path / "notes.parquet"], tmp_path / "out")
    assert [row["id"] for row in files.rows(tmp_path / "out/documents.parquet")] == list("01234")


@pytest.mark.parametrize("change, said", [
    ({"out": True}, "exists: want a folder that does not"),
    ({"suffix": ".txt"}, "has the ending '.txt': want .jsonl or .parquet"),
    ({"text": "Short."}, "no row of notes.jsonl is left"),
    ({"raw": "{\n"}, "row 1 is not JSON"),
])
def test_refuses(change, said, tmp_path, sentences):
    path = write(tmp_path / f"notes{change.get('suffix', '.jsonl')}", [change.get("text", sentences(1))])
    if "raw" in change:
        path.write_text(change["raw"])
    if "out" in change:
        (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=said):
        curate([path], tmp_path / "out")
    assert "out" in change or not list(tmp_path.glob("out*"))


def test_settings_say_what_is_wrong(tmp_path):
    path = tmp_path / "settings.yaml"
    for text, said in (("filter: {min_word: 3}", "filter.min_word: no such key"),
                       ("deduplicate: {jaccard: 2}", "deduplicate.jaccard=2"),
                       ("deidentify: {patterns: {NICKNAME: x}}", "patterns.NICKNAME: want one of"),
                       ("[", "is not YAML")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            load(path)
