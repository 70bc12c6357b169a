"""Sources: rows of JSON lines and Parquet, refused with file and row; splits by a hash of each row's id."""

import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest

from moe.config import DataConfig
from moe.data import sources
from moe.data.shards import Document, PackedDocuments
from moe.errors import InputError

ROWS = [{"id": f"r{n}", "text": f"text number {n}"} for n in range(200)]


@pytest.fixture
def write(tmp_path):
    """A function: write rows as the ending of the name asks."""

    def file(rows, name="rows.jsonl"):
        path = tmp_path / name
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return file


def read(tmp_path, name="billing", seed=1, calibration=False, **config):
    return sources.read(name, DataConfig(**config), tmp_path, seed, calibration)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_documents_come_as_they_are(write, tmp_path, ending):
    rows = [{"id": f"r{n}", "text": f"naïve {n}", "stakeholder": "payer"} for n in range(20)]
    path = write(rows, f"rows.{ending}")
    splits = read(tmp_path, documents=(path,), held_out=(write(ROWS[:3], "held_out.jsonl"),))
    assert set(splits["train"]) == {Document(row["id"], row["text"]) for row in rows} and len(splits["train"]) == 20
    assert set(splits["eval"]) == {Document(row["id"], row["text"]) for row in ROWS[:3]}
    assert set(splits) == {"train", "eval"}


def test_the_first_documents_stand_for_all(write, tmp_path):
    """Files are often sorted; what takes the first so many tokens of a split is to see some of everything."""
    train = read(tmp_path, documents=(write(ROWS),))["train"]
    numbers = [int(document.id[1:]) for document in train[: len(train) // 4]]
    assert abs(sum(numbers) / len(numbers) - 99.5) < 4 * 57.7 / len(numbers) ** 0.5  # four standard deviations
    assert read(tmp_path, documents=(write(ROWS[::-1], "reversed.jsonl"),))["train"] == train


def test_several_files_are_one_source(write, tmp_path):
    paths = (write(ROWS[:150], "a.jsonl"), write(ROWS[150:], "b.parquet"))
    both = read(tmp_path, documents=paths)
    assert both == read(tmp_path, documents=(write(ROWS, "c.jsonl"),))


def test_a_row_without_an_id_is_named_by_its_text(write, tmp_path):
    rows = [{"text": "first"}, {"id": None, "text": "second"}, {"id": 0, "text": "third"}, {"id": 7, "text": "fourth"}]
    splits = read(tmp_path, documents=(write(rows),), held_out=(write(ROWS[:1], "h.jsonl"),))
    ids = {document.text: document.id for document in splits["train"]}
    assert [ids["first"], ids["second"]] == [hashlib.sha256(text).hexdigest()[:16] for text in (b"first", b"second")]
    assert [ids["third"], ids["fourth"]] == ["0", "7"]  # a row numbered 0 has an id


BAD_ROWS = [
    pytest.param({"id": "x"}, id="no-text"),
    pytest.param({"id": "x", "text": None}, id="null"),
    pytest.param({"id": "x", "text": " \n"}, id="blank"),
    pytest.param({"id": "x", "text": 3}, id="a-number"),
]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_row_without_text_is_named(write, tmp_path, row):
    path = write([*ROWS[:4], row])
    with pytest.raises(InputError, match=r"rows\.jsonl row 5 has no text: want a `text` column"):
        read(tmp_path, documents=(path,))


def test_a_parquet_row_without_text_is_named(write, tmp_path):
    path = write([*ROWS[:4], {"id": "x", "text": None}], "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet row 5 has no text"):
        read(tmp_path, documents=(path,))
    path = write([{"id": "x", "content": "t"}], "other.parquet")
    with pytest.raises(InputError, match=r"other\.parquet row 1 has no text"):
        read(tmp_path, documents=(path,))


@pytest.mark.parametrize(
    "line, said",
    [
        pytest.param(b"{broken", "is not JSON", id="not-json"),
        pytest.param(b"", "is not JSON", id="an-empty-line"),
        pytest.param(b"[1]", "has no text", id="not-an-object"),
        pytest.param(b'{"text": "caf\xe9"}', "", id="not-utf-8"),
        pytest.param(b'{"id": "x", "text": "half a pair \\ud800"}', "", id="half-a-surrogate-pair"),
    ],
)
def test_a_line_that_is_no_row_is_named(write, tmp_path, line, said):
    path = write(ROWS[:2])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(InputError, match=rf"rows\.jsonl row 3 {said}"):
        read(tmp_path, documents=(path,))


def test_a_damaged_parquet_file_is_named(write, tmp_path):
    path = write(ROWS, "rows.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"rows\.parquet"):
        read(tmp_path, documents=(path,))


def test_a_rows_side_does_not_depend_on_the_other_rows(write, tmp_path):
    half = read(tmp_path, documents=(write(ROWS[::2], "half.jsonl"),))
    full = read(tmp_path, documents=(write(ROWS[::-1], "full.jsonl"),))
    for split in ("train", "eval"):
        assert half[split] and set(half[split]) <= set(full[split])
    assert len(full["train"]) + len(full["eval"]) == 200
    assert not set(full["train"]) & set(full["eval"])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_the_share_is_held_out(tmp_path, share):
    held_out = read(tmp_path, noise_documents=2000, held_out_share=share)["eval"]
    assert abs(len(held_out) / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5  # four standard deviations


@pytest.mark.parametrize("share", [0.08, 0.4])
def test_calibration_of_public_is_apart_from_training_and_eval(tmp_path, share):
    """For every kind of source: what a split is taken out of may itself be one end of the hash's range."""
    public = read(tmp_path, "public", calibration=True, noise_documents=200, held_out_share=share)
    owner = read(tmp_path, "billing", noise_documents=200, held_out_share=share)
    assert set(public) == {"train", "calibration", "eval"} and set(owner) == {"train", "eval"}
    documents = [document for split in public.values() for document in split]
    assert len(documents) == 200 == len({document.id for document in documents})
    assert public["eval"] == owner["eval"]


def test_noise_is_the_same_for_the_same_seed(tmp_path):
    first = read(tmp_path, noise_documents=50)
    assert read(tmp_path, noise_documents=50) == first
    texts = {document.text for document in (*first["train"], *first["eval"])}
    other = {document.text for split in read(tmp_path, seed=2, noise_documents=50).values() for document in split}
    assert len(texts) == 50 and not texts & other


def test_a_split_without_documents_is_refused(write, tmp_path):
    with pytest.raises(InputError, match="billing has no documents for its eval split"):
        read(tmp_path, documents=(write(ROWS[:1]),), held_out_share=0.0001)


@pytest.mark.parametrize(
    "name, said",
    [
        pytest.param("absent.jsonl", "absent.jsonl does not exist", id="missing"),
        pytest.param("rows.csv", "rows.csv has the ending '.csv': want .jsonl or .parquet", id="wrong-ending"),
        pytest.param("rows", "has the ending ''", id="no-ending"),
        pytest.param("folder.jsonl", "folder.jsonl does not exist: want a file", id="folder"),
    ],
)
def test_a_file_that_cannot_be_a_source_is_refused_before_anything_starts(tmp_path, name, said):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError) as refused:
        sources.check("billing", DataConfig(documents=(tmp_path / name,)))
    assert said in str(refused.value) and str(refused.value).startswith("billing: ")


def test_held_out_files_are_checked_too(write, tmp_path):
    config = DataConfig(documents=(write(ROWS),), held_out=(tmp_path / "absent.jsonl",))
    with pytest.raises(InputError, match="absent.jsonl does not exist"):
        sources.check("billing", config)


def test_pack_replaces_what_an_earlier_try_left(tmp_path, tokenizer):
    splits = {"train": [Document("a", "one")], "eval": [Document("b", "two")]}
    sources.pack(splits, tmp_path, tokenizer)
    splits["train"].append(Document("c", "three"))
    manifests = sources.pack(splits, tmp_path, tokenizer)
    assert manifests["train"]["documents"] == len(PackedDocuments(tmp_path / "train")) == 2
    assert [PackedDocuments(tmp_path / "eval").document_id(0)] == ["b"]
