"""`polyclinic data`: what it writes can be trained on, what it shows is no text, damage is named; and who ends it, by
whatever signal, finds no text left behind."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
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
def curate_extra():
    pytest.importorskip("presidio_analyzer", reason="wants the extra curate: pip install -e '.[curate]'")


@pytest.fixture
def polyclinic(monkeypatch, capsys, tmp_path):
    """A function: run the command in tmp_path as a shell would; give its status and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["polyclinic", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


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


def test_curate_writes_what_is_left_or_only_counts(tmp_path, curate_extra):
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


def test_sources_are_counted_and_names_of_files_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / f"tree/{'reports_of_the_year' * 3}.jsonl"
    path.parent.mkdir()
    rows = [{"text": SECRET * 100, "source": f"page {n}", "licence": "CC0"} for n in range(2_000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"text": "\\ud800"}\n')
    screen = told("inspect", tmp_path / "tree")
    assert path.name in "".join(line.split("  ")[0].strip() for line in screen.splitlines()) and "…" not in screen
    assert screen.count("page ") == 20 and "and 1,980 more" in screen
    assert "1 rows are not Unicode" in screen


BAD = {
    "cut off": b'{"text": "Olga Haddad',
    "latin-1": b'{"text": "Olga Haddad \xff"}',
    "deep": b'{"Haddad": ' + b"[" * 100_000,
    "digits": b'{"Haddad": ' + b"9" * 5_000 + b"}",
    "no object": b'["Haddad"]',
}


@pytest.mark.parametrize("command", [("inspect",), ("curate", "--dry-run", "--workers", 1),
                                     ("curate", "--out", "out", "--workers", 1)], ids=["inspect", "dry-run", "curate"])
@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in BAD.items()])
def test_a_bad_row_is_one_sentence_and_status_2(polyclinic, tmp_path, command, content, curate_extra):
    (tmp_path / "notes.jsonl").write_bytes(b'{"text": "The nodule measures 12 mm."}\n' + content + b"\n")
    status, out, error = polyclinic(*command, "notes.jsonl")
    assert status == 2 and out == "" and error.startswith("polyclinic: wrong input: notes.jsonl row 2 "), error
    assert error.count("\n") == 1 and "Haddad" not in error and "99" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.jsonl"]


def test_only_out_cannot_be_written(polyclinic, tmp_path, monkeypatch, curate_extra):
    """What cannot be read is a wrong input, and where nothing is to be written nothing is said to have failed to be."""
    (tmp_path / "link.jsonl").symlink_to("/proc/self/mem")
    (tmp_path / "notes.jsonl").write_text('{"text": "The nodule measures 12 mm."}\n')
    (tmp_path / "taken").write_text("a file where a folder is wanted: this fails for root too")
    for out in (("--dry-run",), ("--out", "out")):
        status, _, error = polyclinic("curate", "link.jsonl", *out)
        assert status == 2 and "link.jsonl cannot be read: " in error and "written" not in error, error
    status, _, error = polyclinic("curate", "notes.jsonl", "--out", "taken/out", "--workers", 1)
    assert status == 1 and error.startswith("polyclinic: taken/out cannot be written") and error.count("\n") == 1, error
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    status, _, error = polyclinic("curate", "notes.jsonl", "--dry-run", "--workers", 1)
    assert status == 1 and f"no room in {tmp_path}/absent for the rows meanwhile: No such file" in error, error


def test_a_lost_process_is_one_sentence_and_status_1(polyclinic, tmp_path, monkeypatch, curate_extra):
    from moe.data.curation import rows, workers

    def lost(*_):
        raise workers.WorkerLost("a process was ended: want fewer workers")
        yield

    monkeypatch.setattr(rows, "look", lost)
    (tmp_path / "notes.jsonl").write_text('{"text": "The nodule measures 12 mm."}\n')
    assert polyclinic("curate", "notes.jsonl", "--out", "out") == (
        1, "", "polyclinic: a process was ended: want fewer workers\n")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_all_is_well_and_status_0(polyclinic, tmp_path, curate_extra):
    (tmp_path / "notes.jsonl").write_text('{"text": "The nodule measures 12 mm. MRN: 00482913", "Olga": 1}\n')
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    status, out, error = polyclinic("curate", "notes.jsonl", "--out", "out", "--workers", 1)
    assert (status, error) == (0, "") and "note: only text is looked into" in out and "left out: Olga" in out
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert polyclinic("inspect", "out")[0] == 0


# --- ended in the middle


def processes(session):
    """Of a session, by id, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if (folder / "stat").read_text().rsplit(")", 1)[1].split()[3] == str(session):
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
    return {process: line for process, line in found.items() if line}  # those that are not over


def wait(condition, seconds=100):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.fixture
def curating(tmp_path, curate_extra):
    """A function: the command as a process of its own session, over more rows than it gets through."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnoprstu", k=rng.randint(3, 9))) for _ in range(2_000)]
    with (tmp_path / "notes.jsonl").open("w") as file:
        for n in range(40_000):
            text = f"The nodule. Patient: Olga Haddad. MRN: 00482913. {' '.join(rng.choices(words, k=100))}"
            file.write(json.dumps({"id": str(n), "text": text}) + "\n")
    started = []

    def start(workers):
        command = [sys.executable, "-c", "from launch.cli import main; main()", "data", "curate",
                   tmp_path / "notes.jsonl", "--out", tmp_path / "out", "--workers", str(workers)]
        with (tmp_path / "said").open("w") as said:
            root = Path(cli.__file__).parents[1]
            started.append(subprocess.Popen(command, stdout=said, stderr=said, cwd=root, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def changes_of_some_rows(tmp_path):
    return any(path.stat().st_size > 20_000 for path in tmp_path.glob(".out.*.partial/changes.jsonl"))


@pytest.mark.parametrize("number, status, workers", [
    (signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 2), (signal.SIGHUP, 129, 1),
])  # fmt: skip
def test_who_is_told_to_end_leaves_nothing(curating, tmp_path, number, status, workers):
    process = curating(workers)
    wait(lambda: changes_of_some_rows(tmp_path))
    process.send_signal(number)
    assert process.wait(60) == status
    assert {path.name for path in tmp_path.iterdir()} == {"notes.jsonl", "said"}
    assert (tmp_path / "said").read_text() == ""
    wait(lambda: not processes(process.pid))


def test_who_is_killed_leaves_no_process_and_no_text_but_what_is_to_be_read(curating, tmp_path):
    process = curating(2)
    wait(lambda: changes_of_some_rows(tmp_path))
    process.kill()
    process.wait()
    wait(lambda: not processes(process.pid))
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "notes.jsonl"]
    assert left and not any(b"nodule" in path.read_bytes() for path in left)


def test_ctrl_c_while_processes_begin_is_silent(curating, tmp_path):
    """All processes of a terminal are told; the server of processes still imports what they need."""
    process = curating(2)
    wait(lambda: any(b"forkserver" in line for line in processes(process.pid).values()))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    wait(lambda: not processes(process.pid))
    assert (tmp_path / "said").read_text() == "" and not list(tmp_path.glob("*out*"))
