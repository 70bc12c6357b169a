"""`polyclinic data`: what it writes can be trained on, what it shows is no text, damage is named."""

import json

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.graph import RunFailed
from moe.config import DataConfig
from moe.data import demonstration, sources
from moe.errors import InputError

SECRET = "the quick brown patient jumps over the lazy nurse"


def told(*arguments):
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "notes.jsonl"
    rows = [{"id": "1", "text": SECRET, "licence": "CC0", "source": "ward 3"}, {"id": "2", "text": SECRET},
            {"id": "3", "text": f"{SECRET} twice"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_counts_without_a_word_of_the_text(file, tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = json.loads(told("inspect", file, "--tokenizer", tmp_path, "--json"))["files"]["notes.jsonl"]
    assert (found["rows"], found["exact_duplicates"], found["empty"]) == (3, 1, 0)
    assert found["characters"] == 3 * len(SECRET) + len(" twice") and found["tokens"] > 30
    assert found["licences"] == [["CC0", "ward 3"]]
    assert found["length_quantiles"]["median"] == len(SECRET)
    screen = told("inspect", file)
    assert "patient" not in screen and "nurse" not in screen and "ward 3: CC0" in screen


def test_packed_shards_and_their_damage(packed, make_documents, tmp_path):
    text = packed(make_documents(20))
    found = json.loads(told("inspect", text.folder, "--json"))
    assert found["files"]["packed"]["documents"] == 20 and found["verified"] == 4
    shard = text.folder / "00000.tokens.npy"
    whole = bytearray(shard.read_bytes())
    whole[-2] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(RunFailed, match="is not what its manifest says"):
        told("inspect", text.folder)


def test_the_demonstration_is_built_and_can_be_trained_on(tmp_path):
    try:
        demonstration.check_installed("billing")
    except InputError as error:
        pytest.skip(str(error))
    options = ("build", tmp_path / "corpus", "--domain", "billing", "--max-characters", "40000")
    assert "Not for clinical use" in told(*options)
    made = {path.name for path in (tmp_path / "corpus/billing").iterdir()}
    assert made >= {"documents.train.jsonl", "documents.eval.jsonl", "qa.train.jsonl", "preferences.train.jsonl"}
    train, held_out = (tmp_path / f"corpus/billing/documents.{split}.jsonl" for split in ("train", "eval"))
    section = DataConfig(documents=(train,), held_out=(held_out,))
    sources.check("billing", section)
    splits = sources.read("billing", section, tmp_path, seed=1)
    assert len(splits["train"]) > 20 and splits["eval"]
    assert "files are what their manifest says" in told("inspect", tmp_path / "corpus")
    train.write_text("{}\n")
    damaged = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "corpus")])
    assert damaged.exit_code == 1 and "DAMAGED billing/documents.train.jsonl" in damaged.stdout
    with pytest.raises(InputError, match="corpus exists"):
        told(*options)


def test_curate_writes_what_is_left_or_only_counts(tmp_path):
    pytest.importorskip("presidio_analyzer", reason="wants the extra curate: pip install -e '.[curate]'")
    path = tmp_path / "notes.jsonl"
    texts = ["The nodule measures 12 x 5 mm in the right upper lobe. MRN: 00482913.", "Short."]
    path.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    counted = told("curate", path, "--dry-run", "--workers", 1)
    assert "1 rows would be left" in counted and "MRN 1" in counted and "too_short 1" in counted
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.jsonl"]
    told("curate", path, "--out", tmp_path / "curated", "--workers", 1)
    (row,) = map(json.loads, (tmp_path / "curated/documents.jsonl").read_text().splitlines())
    assert row["text"].endswith("[MRN].")


@pytest.mark.parametrize("arguments, message", [
    (("inspect", "nowhere"), "nowhere does not exist"),
    (("build", "corpus", "--domain", "surgery"), "unknown specialty 'surgery'"),
    (("curate", "notes.jsonl"), "want --out FOLDER, or --dry-run"),
])
def test_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        told(*arguments)
