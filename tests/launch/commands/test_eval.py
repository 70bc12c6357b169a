"""`polyclinic eval`: bits per byte of files, with and without owners; lm-eval's tasks; wrong input in a sentence."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from moe.errors import InputError
from moe.eval.bits import bits_per_byte
from moe.hf import folder
from moe.specialty.merge import merge, opt_out

ROOT = Path(__file__).parents[3]
PATIENCE = 100  # seconds, on a busy machine


def told(*arguments):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.fixture
def model(make_anchor, make_pack):
    anchor = make_anchor()
    return merge(anchor, [make_pack(anchor, "billing", 1), make_pack(anchor, "radiology", 7, patient=2)])


@pytest.fixture
def saved(model, tmp_path):
    folder.save(tmp_path / "model", model)
    return tmp_path / "model"


@pytest.fixture
def file(make_documents, tmp_path):
    rows = make_documents(8, seed=3)
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps({"id": row.id, "text": row.text}) + "\n" for row in rows))
    return path


def test_bits_of_each_subset(saved, model, file, make_documents, packed):
    answer = json.loads(told(saved, f"films={file}", "--removals", "--json"))
    found = answer["texts"]["films"]["bpb"]
    assert list(found) == ["all owners", "without billing", "without radiology", "anchor alone"]
    text = packed(make_documents(8, seed=3))
    for who, leaving in (("all owners", []), ("without billing", ["billing"]),
                         ("anchor alone", ["billing", "radiology"])):
        want = bits_per_byte(opt_out(model, leaving).decoder, text, None)
        assert found[who] == want, who  # the same bits: masked and never merged
    assert len(set(found.values())) == 4
    chosen = json.loads(told(saved, file, "--owners", "radiology", "--json"))["texts"]["held-out"]
    assert chosen["bpb"] == {"radiology": found["without billing"]}
    few = json.loads(told(saved, file, "--max-tokens", "60", "--json"))["texts"]["held-out"]
    assert 0 < few["bytes"] < chosen["bytes"]


def test_what_stakeholders_prefer_is_mixed_in(saved, file):
    found = {mix: json.loads(told(saved, file, *mix, "--removals", "--json"))["texts"]["held-out"]["bpb"]
             for mix in ((), ("--mix", "patient=0"), ("--mix", "patient=1"))}  # fmt: skip
    plain, nothing, patient = found.values()
    assert plain == nothing
    moved = {who for who in plain if patient[who] != plain[who]}
    assert moved == {"all owners", "without billing"}  # only radiology's expert was aligned


def test_tables_for_people(saved, file):
    screen = told(saved, file, "--removals")
    assert "bits per byte" in screen and "without radiology" in screen and "Not for clinical use." in screen


def test_tasks_of_a_folder(saved, file, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="wants the package lm-eval: pip install -e '.[eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/films.yaml").write_text(
        f"task: films\ndataset_path: json\noutput_type: loglikelihood_rolling\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {tmp_path}}}\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]\n")  # fmt: skip
    options = ("--task", "films", "--include", tmp_path / "tasks", "--limit", "4")
    found = json.loads(told(saved, *options, "--json"))["tasks"]["films"]
    assert 0 < found["bits_per_byte,none"] < 20
    assert "films" in told(saved, *options)
    with pytest.raises(InputError, match="task exams is not known to lm-eval and .*tasks"):
        told(saved, "--task", "exams", "--include", tmp_path / "tasks")
    file.unlink()
    with pytest.raises(InputError, match="tasks films do not run: FileNotFoundError: .*; want tasks whose data"):
        told(saved, *options)


@pytest.mark.parametrize("arguments, message", [
    ((), "nothing to measure"),
    (("x.txt",), "x: x.txt has the ending '.txt': want .jsonl or .parquet"),
    (("x.jsonl",), "x: x.jsonl does not exist"),
    (("FILE", "--limit", "3"), "--limit is given without --task"),
    (("--task", "x", "--removals"), "--removals is given without texts"),
    (("--task", "x", "--max-tokens", "3"), "--max-tokens is given without texts"),
    (("FILE", "FILE"), "two texts are called held-out: want a name before each, such as new="),
    (("FILE", "--owners", "dentist"), "owner dentist has no pack in this model: want some of billing, radiology"),
    (("--task", "x", "--include", "nowhere"), "--include nowhere is no folder"),
    (("FILE", "--mix", "patient"), "--mix patient: want GROUP=LAMBDA"),
    (("FILE", "--mix", "patient=much"), "--mix patient=much: want GROUP=LAMBDA"),
    (("FILE", "--mix", "patient=1,patient=0"), "names patient twice"),
    (("FILE", "--mix", "payer=1"), "group payer is not in this model: want some of patient"),
])
def test_refuses(arguments, message, saved, file):
    with pytest.raises(InputError, match=message):
        told(saved, *(file if argument == "FILE" else argument for argument in arguments))


def test_a_machine_that_is_taken_away_keeps_no_text(saved, tmp_path):
    """SIGTERM is how clusters end a job: of the documents that were packed for it nothing stays behind."""
    (tmp_path / "scratch").mkdir()
    text = " ".join(f"word{n}" for n in range(200))
    (tmp_path / "many.jsonl").write_text(f'{{"text": "{text}"}}\n' * 5_000)
    code = "from launch.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "eval", str(saved), str(tmp_path / "many.jsonl")], stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "scratch")})  # fmt: skip
    try:
        until = time.time() + PATIENCE
        while not list((tmp_path / "scratch").rglob("*.npy")) and process.poll() is None and time.time() < until:
            time.sleep(0.02)
        process.terminate()
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in said, said
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []


def test_an_empty_file_is_named(saved, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="empty: .*empty.jsonl has no documents"):
        told(saved, tmp_path / "empty.jsonl")


def test_owners_are_named_once_and_with_spaces(saved, file):
    found = json.loads(told(saved, file, "--owners", "billing, radiology,billing", "--json"))["texts"]["held-out"]
    assert list(found["bpb"]) == ["billing and radiology"]


def test_a_model_without_owners(make_anchor, tmp_path, file):
    folder.save(tmp_path / "dense", make_anchor())
    assert list(json.loads(told(tmp_path / "dense", file, "--json"))["texts"]["held-out"]["bpb"]) == ["the model"]
    with pytest.raises(InputError, match="want a merged model"):
        told(tmp_path / "dense", file, "--removals")
