"""What a curation reads and writes: OUT whole and its own, every value of what is kept, and what is said of it."""

import datetime
import json

import pyarrow
import pytest
from pyarrow import parquet

from moe.data import files
from moe.data.curation.curation import curate
from moe.data.curation.settings import Settings
from moe.errors import InputError

pytest.importorskip("presidio_analyzer", reason="wants the extra curate: pip install -e '.[curate]'")

PLAIN = {"deidentify": None, "filter": None, "deduplicate": None, "decontaminate": None}


def keeping(*columns, **sections):
    return Settings.model_validate(PLAIN | {"columns": columns} | sections)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_nothing_beside_out_is_touched(tmp_path):
    for name in ("out.partial", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("kept")
    curate([write(tmp_path / "notes.jsonl", {"text": "a"})], tmp_path / "out", settings=keeping())
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", ".out.partial", "notes.jsonl", "out"}
    assert (tmp_path / "out.partial/mine.txt").read_text() == "kept"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"documents.jsonl", "changes.jsonl", "manifest.json"}


def test_two_that_write_one_out_do_not_meet(tmp_path):
    """The one that comes to its end first has it, whole; of the other nothing is left."""
    paths = [write(tmp_path / f"{name}.jsonl", {"id": name, "text": name}) for name in ("first", "second")]

    def second(what, done, total):
        if what == "writing":
            curate(paths[1:], tmp_path / "out", settings=keeping())

    with pytest.raises(OSError):
        curate(paths[:1], tmp_path / "out", settings=keeping(), tell=second)
    assert [row["id"] for row in read(tmp_path / "out/documents.jsonl")] == ["second"]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["inputs"][0]["file"] == "second.jsonl"
    assert {path.name for path in tmp_path.iterdir()} == {"first.jsonl", "second.jsonl", "out"}


@pytest.mark.parametrize("out", ["out", None])
def test_the_text_has_no_name_on_the_disk_meanwhile(tmp_path, monkeypatch, out):
    """So that it is gone even where the process is killed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = write(tmp_path / "notes.jsonl", *({"id": str(n), "text": f"haddad {n}"} for n in range(3_000)))
    seen = []

    def tell(what, done, total):
        if what == "reading" and done == total:
            seen.append({file.name for file in tmp_path.rglob("*")
                         if file.is_file() and file != path and b"haddad" in file.read_bytes()})

    curate([path], tmp_path / out if out else None, settings=keeping(deduplicate={}), tell=tell)
    assert seen and not any(seen)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.jsonl", *filter(None, [out])}


def test_a_column_keeps_its_type_and_its_values(tmp_path):
    """Also where its first 10,000 rows have none; and a date is one again."""
    count, when = files.ROWS_WRITTEN + 1, datetime.datetime(2021, 3, 14, 10, 30)
    table = pyarrow.table({
        "text": [f"text {n}" for n in range(count)], "id": pyarrow.array(range(count), pyarrow.int64()),
        "age": pyarrow.array([None] * (count - 1) + [64], pyarrow.int16()), "when": [when] * count,
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "notes.parquet")
    settings = keeping("age", "when", "id")
    manifest = curate([tmp_path / "notes.parquet"], tmp_path / "out", settings=settings)
    *_, last = files.rows(tmp_path / "out/documents.parquet")
    assert manifest["rows"] == count and (last["age"], last["when"], last["id"]) == (64, when, str(count - 1))
    assert parquet.read_schema(tmp_path / "out/documents.parquet").field("age").type == pyarrow.int16()
    lines = write(tmp_path / "more.jsonl", {"text": "a", "age": "old"})
    curate([tmp_path / "notes.parquet", lines], tmp_path / "lines", settings=settings)
    rows = read(tmp_path / "lines/documents.jsonl")
    assert (rows[-2]["when"], rows[-2]["age"], rows[-1]["age"]) == ("2021-03-14T10:30:00", 64, "old")


def test_what_json_cannot_say_is_refused_where_it_is_kept(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"], "scan": [b"haddad"]}), tmp_path / "notes.parquet")
    curate([tmp_path / "notes.parquet"], tmp_path / "without", settings=keeping())
    with pytest.raises(InputError, match=r"parquet row 1 has in a column that is kept what JSON cannot say") as caught:
        curate([tmp_path / "notes.parquet"], tmp_path / "out", settings=keeping("scan"))
    assert "haddad" not in str(caught.value) and not (tmp_path / "out").exists()


def test_half_of_a_surrogate_pair_is_no_text_wherever_it_stands(tmp_path):
    half = "\ud800"
    path = write(tmp_path / "notes.jsonl", {"id": half, "text": "a"}, {"id": "1", "text": half},
                 {"id": half, "text": half}, {"id": "3", "text": "b", "source": half}, {"text": "c", "mark": [half]})
    manifest = curate([path], tmp_path / "out", settings=keeping("mark"))
    assert [row["id"] for row in read(tmp_path / "out/documents.jsonl")] == ["?"] and manifest["rows"] == 1
    changes = read(tmp_path / "out/changes.jsonl")
    assert [(change["row"], change["id"], change["reason"]) for change in changes] == [
        (2, "1", "not_unicode"), (3, "?", "not_unicode"), (4, "3", "not_unicode"), (5, None, "not_unicode"),
    ]  # fmt: skip


@pytest.mark.parametrize("against", [False, True], ids=["documents", "evaluation"])
def test_an_input_that_cannot_be_read_is_named(tmp_path, against):
    (tmp_path / "link.jsonl").symlink_to("/proc/self/mem")
    notes = write(tmp_path / "notes.jsonl", {"text": "a"})
    with pytest.raises(InputError, match=r"link\.jsonl cannot be read: "):
        curate([notes if against else tmp_path / "link.jsonl"], tmp_path / "out",
               [tmp_path / "link.jsonl"] if against else [], keeping(decontaminate={}))
    assert not (tmp_path / "out").exists()


def test_the_manifest_names_licences_of_the_most_rows_and_counts_the_others(tmp_path):
    rows = [{"text": "ab", "licence": "CC0", "source": f"page {n}"} for n in range(150)]
    path = write(tmp_path / "notes.jsonl", *rows, *({"text": "abc", "licence": "MIT"} for _ in range(3)))
    manifest = curate([path], None, settings=keeping())
    assert len(manifest["licences"]) == 100
    assert manifest["other_licences"] == {"pairs": 51, "rows": 51, "characters": 102}
    assert {"licence": "MIT", "source": "not stated", "rows": 3, "characters": 9} in manifest["licences"]


def test_what_is_not_looked_into_is_told(tmp_path):
    path = write(tmp_path / "notes.jsonl", {"text": "a"})
    (warning,) = [each for each in curate([path], None, settings=keeping("mark", deidentify={}))["warnings"]
                  if "only text is looked into" in each]
    assert "stays (id, specialty, owner, source, licence, concept, mark)" in warning
