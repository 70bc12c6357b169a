"""The command: what is wrong is one sentence and a status, before anything starts, and nothing is left behind."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import cli
from launch import train as launch_train
from launch.graph import Preempted, Progress, RunFailed, Skipped, Stopped
from launch.session import Capacity
from moe.config_file import load
from moe.data.demonstration import packages
from moe.errors import InputError

COMMAND = Path(sys.executable).with_name("polyclinic")


@pytest.fixture
def polyclinic(monkeypatch, capsys, tmp_path):
    """A function: run the command in tmp_path; give its status and what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.os, "_exit", sys.exit)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # this process is not the command's

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["polyclinic", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def no_cluster(monkeypatch):
    """Whatever gets as far as a cluster has gone too far."""

    def refuse(config):
        pytest.fail("a cluster was started")

    monkeypatch.setattr(launch_train, "session", refuse)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def one_sentence(said):
    return said.startswith("polyclinic: wrong input: ") and said.count("\n") == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    "overrides, parts",
    [
        pytest.param(["anchor.stepz=3"], ["anchor.stepz", "did you mean anchor.steps?"], id="typo"),
        pytest.param(["model.d_ff=-4"], ["model.d_ff=-4", "greater than 0"], id="negative-size"),
        pytest.param(["owners.cardiology={slot: 3}"], ["owners.cardiology.data is missing"], id="owner-without-data"),
        pytest.param(["anchor.steps"], ["'anchor.steps'", "want key=value"], id="no-value"),
        pytest.param(["anchor.batch_size=6"], ["anchor.batch_size=6", "multiple"], id="batch-over-workers"),
        pytest.param(
            ["owners.billing.data.documents=[absent.jsonl]"], ["billing: absent.jsonl does not exist"], id="no-file"
        ),
        pytest.param(["run.folder=taken"], ["run folder taken/first cannot be written"], id="unwritable-folder"),
        pytest.param(
            ["deepspeed.gradient_clipping=9"], ["deepspeed.gradient_clipping=9 clashes"], id="a-clash-with-deepspeed"
        ),
    ],
)
def test_a_wrong_input_is_one_sentence_and_status_2(polyclinic, no_cluster, config_file, tmp_path, overrides, parts):
    (tmp_path / "taken").write_text("a file where a folder is wanted: this fails for root too")
    before = files(tmp_path)
    status, said = polyclinic("train", config_file, *overrides)
    assert status == 2 and one_sentence(said), said
    assert all(part in said for part in parts), said
    assert files(tmp_path) == before


def test_a_missing_config_is_named(polyclinic, no_cluster, tmp_path):
    status, said = polyclinic("train", "absent.yaml")
    assert status == 2 and one_sentence(said) and "absent.yaml cannot be read: No such file" in said


def test_a_missing_corpus_package_is_named_with_its_mend(polyclinic, no_cluster, config_file, tmp_path, monkeypatch):
    before = files(tmp_path)
    monkeypatch.setattr(packages, "installed_version", lambda package: None)
    status, said = polyclinic("train", config_file, "public={demonstration: public, documents: []}")
    assert status == 2 and said.startswith("polyclinic: wrong input: ") and "Traceback" not in said
    assert "fhir.resources" in said and "install" in said
    assert files(tmp_path) == before


def test_a_name_in_use_is_refused_and_left_as_it_is(polyclinic, no_cluster, config_file, tmp_path):
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/config.yaml").write_text("of another run")
    before = files(tmp_path)
    status, said = polyclinic("train", config_file)
    assert status == 2 and one_sentence(said) and "exists: want another run.name, or --resume" in said
    assert files(tmp_path) == before and (tmp_path / "runs/first/config.yaml").read_text() == "of another run"


def test_there_must_be_something_to_resume(polyclinic, no_cluster, config_file, tmp_path):
    before = files(tmp_path)
    status, said = polyclinic("train", config_file, "--resume")
    assert status == 2 and one_sentence(said) and "there is none of that name; start it without --resume" in said
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "ends_with, status, part",
    [
        pytest.param(InputError("x=3: want 4"), 2, "wrong input: x=3: want 4", id="wrong-input"),
        pytest.param(RunFailed("stage anchor failed: boom"), 1, "stage anchor failed: boom", id="failure"),
        pytest.param(Preempted(), 75, "told to go (SIGTERM), stopped at a checkpoint", id="told-to-go"),
        pytest.param(Stopped(), 130, "--resume goes on", id="stopped-at-a-checkpoint"),
        pytest.param(KeyboardInterrupt(), 130, "stopped at once", id="stopped-at-once"),
    ],
)
def test_the_status_says_how_it_ended(polyclinic, monkeypatch, config_file, ends_with, status, part):
    def ends(*_):
        raise ends_with

    monkeypatch.setattr(launch_train, "train", ends)
    assert polyclinic("train", config_file)[0] == status
    said = polyclinic("train", config_file)[1]
    assert part in said and said.count("\n") == 1


def test_what_a_sentence_quotes_is_not_taken_for_a_style(polyclinic, monkeypatch, config_file):
    def ends(*_):
        raise InputError("want some of [bold]billing[/bold] [0, 1]")

    monkeypatch.setattr(launch_train, "train", ends)
    assert "want some of [bold]billing[/bold] [0, 1]" in polyclinic("train", config_file)[1]


@pytest.mark.skipif(not COMMAND.exists(), reason="the distribution is not installed here")
def test_the_command_itself(config_file, tmp_path):
    end = subprocess.run(
        [COMMAND, "train", config_file, "anchor.stepz=3"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert end.returncode == 2 and end.stdout == "" and one_sentence(end.stderr), end.stderr


def test_help_shows_an_example(polyclinic, capsys):
    for arguments in (("--help",), ("train", "--help")):
        status, said = polyclinic(*arguments)
        assert status == 0 and not said


# --- what a run leaves before its first stage


@pytest.fixture
def cluster(monkeypatch):
    """A cluster that is there at once and does nothing: the graph is at its end as soon as it is begun."""

    @contextlib.contextmanager
    def session(config):
        yield Capacity(use_gpu=False, local=True, device="none")

    monkeypatch.setattr(launch_train, "session", session)

    def follow(config, run, capacity, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch_train, "_follow", follow)


def test_a_backend_that_does_not_run_here_is_refused(polyclinic, cluster, config_file, tmp_path):
    status, said = polyclinic("train", config_file, "run.backend=triton")
    assert status == 2 and "run.backend=triton: no worker has a GPU" in said
    assert not (tmp_path / "runs").exists()


def test_a_run_describes_itself_before_it_begins(polyclinic, cluster, config_file, tmp_path):
    assert polyclinic("train", config_file, "run.precision=auto", "anchor.steps=9")[0] == 130
    folder = tmp_path / "runs/first"
    written = load(folder / "config.yaml")
    assert written.run.precision in ("float32", "bfloat16")  # what `auto` means here
    wanted = load(config_file, ["anchor.steps=9", f"run.precision={written.run.precision}"])
    assert written == wanted
    manifest = yaml.safe_load((folder / "manifest.json").read_text())  # JSON is YAML
    assert manifest["notice"] == "Not for clinical use." and manifest["versions"]["torch"]
    assert polyclinic("train", config_file, "--resume", "anchor.steps=9")[0] == 130


def test_where_no_cluster_answers_the_command_can_be_given_again(polyclinic, monkeypatch, config_file, tmp_path):
    """A run that has not begun must not be in its own way: neither with --resume nor without."""

    @contextlib.contextmanager
    def session(config):
        raise InputError("cluster.address=nowhere: no Ray cluster answers there")
        yield

    monkeypatch.setattr(launch_train, "session", session)
    before = files(tmp_path)
    for _ in range(2):
        status, said = polyclinic("train", config_file)
        assert status == 2 and "no Ray cluster answers there" in said
    assert files(tmp_path) == before


# --- which of several errors is said


class Graph:
    def __init__(self, **errors):
        self.progress = Progress(errors=errors)


class Wrapped(Exception):
    """As Ray wraps an error that comes from another process."""

    def __init__(self, cause):
        super().__init__("RayTaskError: a long story")
        self.cause = cause


class OfAJob(Exception):
    """As Ray Train wraps what its workers raised, by rank."""

    def __init__(self, failures):
        super().__init__("TrainingFailedError: a long story")
        self.worker_failures = failures


@pytest.fixture
def run_folder(tmp_path):
    from moe.run_folder import RunFolder

    return RunFolder(tmp_path)


def test_the_users_input_comes_before_our_failure_before_a_stop(run_folder):
    stop, failure, wrong = Stopped(), RuntimeError("boom"), InputError("shard x is damaged")
    with pytest.raises(InputError, match="shard x is damaged"):
        launch_train._raise_first(Graph(a=stop, b=failure, c=Wrapped(wrong), d=Skipped()), run_folder)
    with pytest.raises(RunFailed, match=r"stage b failed: RuntimeError: boom \(see .*stages/b/error\.txt\)"):
        launch_train._raise_first(Graph(a=stop, b=failure, d=Skipped()), run_folder)
    with pytest.raises(Stopped):
        launch_train._raise_first(Graph(a=stop, d=Skipped()), run_folder)
    launch_train._raise_first(Graph(), run_folder)


def test_a_failure_names_what_happened_in_the_worker(run_folder):
    error = OfAJob({1: RuntimeError("another rank fell over it"), 0: Wrapped(ValueError("the loss\nis nan"))})
    with pytest.raises(RunFailed, match=r"stage anchor failed: ValueError: the loss \(see"):
        launch_train._raise_first(Graph(anchor=error), run_folder)
    assert "OfAJob: TrainingFailedError" in (run_folder.stage("anchor") / "error.txt").read_text()
