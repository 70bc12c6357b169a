"""What wandb is told of a run, read back from the file it keeps while offline: numbers, tables, provenance, no text."""

import contextlib
import http.server
import json
import logging
import os
import pty
import select
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from moe import tracking
from moe.config import SpecialtyConfig
from moe.config_file import load
from moe.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PATIENCE = 90  # seconds, on a busy machine
BLOCK, HEADER, FILE_HEADER = 32768, 7, 7  # bytes, of the LevelDB log format that wandb writes


@pytest.fixture
def config(tmp_path):
    overrides = [f"run.folder={tmp_path}", "run.name=ours", "tracking.wandb=offline"]
    config = load(CONFIGS / "quickstart.yaml", overrides)
    assert isinstance(config, SpecialtyConfig)
    RunFolder(config.run.path).stage("anchor").mkdir(parents=True)
    return config


@pytest.fixture
def run(config):
    return RunFolder(config.run.path)


def records(stage):
    """Of all wandb runs that a stage's folder has, in the order they were written."""
    found = []
    for path in sorted(stage.glob("wandb/offline-run-*/run-*.wandb")):
        data, at, parts = path.read_bytes(), FILE_HEADER, b""
        while at + HEADER <= len(data):
            if BLOCK - at % BLOCK < HEADER:
                at += BLOCK - at % BLOCK
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            parts += data[at + HEADER : at + HEADER + length]
            at += HEADER + length
            if kind in (1, 4):  # whole, or the last part
                found.append(Record.FromString(parts))
                parts = b""
    return found


def history(stage):
    """Rows of numbers, as wandb will plot them; its own columns left out."""
    rows = []
    for record in records(stage):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def of_kind(stage, kind):
    return [getattr(record, kind) for record in records(stage) if record.WhichOneof("record_type") == kind]


def artifacts(stage):
    return [record.request.log_artifact.artifact if record.WhichOneof("record_type") == "request" else record.artifact
            for record in records(stage)
            if record.WhichOneof("record_type") == "artifact" or record.request.HasField("log_artifact")]


ROW = {
    "step": 3,
    "loss": 2.5,
    "domains": {"public": 2.0},
    "routing": {"max_violation": 0.5, "load": [[0.25, 0.75], [1.0, 0.0]]},
    "share": {"public": [[0.5, 0.5], [0.1, 0.9]]},
    "alarm": "the router of layer 1 has collapsed",
}
TABLES = [["routing", "load"], ["routing", "share"]]


def test_rows_become_numbers_and_tables(config, run):
    heard = []
    with tracking.tracked(config, run, "anchor") as tracker:
        hear = tracker.hear(lambda row: bool(heard.append(row)) or row["step"] == 3)
        assert hear(ROW) is True  # what the report answers
    assert heard == [ROW]
    (row,) = history(run.stage("anchor"))
    numbers = {key: value for key, value in row.items() if key.split("/")[:2] not in TABLES}
    assert numbers == {"update": 3, "loss": 2.5, "domains/public": 2.0, "routing/max_violation": 0.5}
    tables = {path.name.split("_")[0]: json.loads(path.read_text())
              for path in run.stage("anchor").glob("wandb/*/files/media/table/routing/*.json")}
    assert tables["load"] == {"columns": ["layer", "0", "1"], "data": [[0, 0.25, 0.75], [1, 1.0, 0.0]]}
    assert tables["share"] == {"columns": ["domain", "layer", "0", "1"],
                               "data": [["public", 0, 0.5, 0.5], ["public", 1, 0.1, 0.9]]}
    (alert,) = of_kind(run.stage("anchor"), "alert")
    assert (alert.title, alert.text) == ("update 3", ROW["alarm"])


def test_a_resumed_job_goes_on_in_the_same_run(config, run):
    for step in (1, 2):
        with tracking.tracked(config, run, "anchor") as tracker:
            tracker.hear(lambda row: False)({"step": step, "loss": 1.0 / step})
    ids = {record.run_id for record in of_kind(run.stage("anchor"), "run")}
    assert len(ids) == 1
    assert [row["update"] for row in history(run.stage("anchor"))] == [1, 2]
    run.stage("pack-billing").mkdir()
    with tracking.tracked(config, run, "pack-billing"):
        pass
    (other,) = {record.run_id for record in of_kind(run.stage("pack-billing"), "run")}
    assert other not in ids


def test_runs_belong_together_and_have_the_config(config, run):
    with tracking.tracked(config, run, "anchor"):
        pass
    began = of_kind(run.stage("anchor"), "run")[0]
    assert (began.project, began.run_group, began.job_type, began.display_name) == (
        "polyclinic", "ours", "anchor", "ours/anchor"
    )
    values = {item.key: json.loads(item.value_json) for item in began.config.update}
    assert values["run"]["name"] == "ours" and values["anchor"]["steps"] == config.anchor.steps


def test_artefacts_say_what_was_made_from_what(config, run):
    with tracking.tracked(config, run, "anchor") as tracker:
        tracker.used(lambda: [tracking.Artefact("data-public", "dataset", {"train": {"hash": "ab"}})])
        tracker.made(lambda: tracking.anchor("cd" * 32))
    (made,) = artifacts(run.stage("anchor"))
    assert (made.name, made.type, json.loads(made.metadata)) == ("ours-anchor", "model", {"anchor_hash": "cd" * 32})
    assert [entry.path for entry in made.manifest.contents] == ["provenance.json"]
    updates = [item for record in of_kind(run.stage("anchor"), "config") for item in record.update]
    assert {"data-public": {"train": {"hash": "ab"}}} in [json.loads(item.value_json) for item in updates]


def test_nothing_is_known_of_machine_or_user(config, run):
    with tracking.tracked(config, run, "anchor"):
        pass
    began = of_kind(run.stage("anchor"), "run")[0]
    assert (began.host, began.git.remote_url, began.git.commit) == ("", "", "")
    names = {path.name for path in run.stage("anchor").rglob("*") if path.is_file()}
    assert not names & {"requirements.txt", "wandb-metadata.json", "output.log"}


def test_paths_names_of_files_and_addresses_stay_here(config, run, tmp_path):
    files = tuple(tmp_path / "mary smith" / name for name in ("doe.jsonl", "roe.jsonl"))
    data = config.public.model_copy(update={"demonstration": None, "documents": files})
    billing = config.owners["billing"].model_copy(update={"data": data})
    told = config.model_copy(update={
        "owners": {**config.owners, "billing": billing}, "public": data,
        "cluster": config.cluster.model_copy(update={"address": "ray://10.0.0.7:10001"}),
    })  # fmt: skip
    with tracking.tracked(told, run, "anchor"):
        pass
    values = {item.key: json.loads(item.value_json) for item in of_kind(run.stage("anchor"), "run")[0].config.update}
    assert values["run"]["folder"] == f"…/{tmp_path.name}"
    assert values["public"]["documents"] == values["owners"]["billing"]["data"]["documents"] == 2
    written = b"".join(path.read_bytes() for path in run.stage("anchor").rglob("*.wandb"))
    assert all(word not in written for word in (b"mary", b"doe.jsonl", b"10.0.0.7", str(tmp_path).encode()))


ALONE = """
import sys
from pathlib import Path
from moe import tracking
from moe.config_file import load
from moe.run_folder import RunFolder
config = load(Path(sys.argv[1]), [f"run.folder={sys.argv[2]}", "run.name=ours", f"tracking.wandb={sys.argv[3]}"])
run = RunFolder(config.run.path)
run.stage("anchor").mkdir(parents=True)
with tracking.tracked(config, run, "anchor") as tracker:
    tracker.hear(lambda row: False)({"step": 1, "loss": 1.0, "share": {"public": [[0.5, 0.5]]}})
    tracker.made(lambda: tracking.anchor("cd" * 32))
print("closed")
"""


@pytest.fixture
def alone(tmp_path):
    """A function: a tracked stage in a process of its own, whose user has a terminal, a home and no key; what it
    said."""

    def track(mode, **env):
        ours, theirs = pty.openpty()
        for name in ("home", "tmp"):
            (tmp_path / name).mkdir()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        clean |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT), **env}
        process = subprocess.Popen([sys.executable, "-c", ALONE, CONFIGS / "quickstart.yaml", tmp_path / "runs", mode],
                                   stdin=theirs, stdout=theirs, stderr=theirs, env=clean)
        os.close(theirs)
        said = b""
        try:
            with contextlib.suppress(OSError):  # the terminal ends with the last who has it
                while select.select([ours], [], [], PATIENCE)[0] and (piece := os.read(ours, 4096)):
                    said += piece
            assert process.wait(timeout=PATIENCE) == 0 and b"closed" in said, said.decode()
        finally:
            process.kill()
            os.close(ours)
        return said.decode()

    return track


def test_nobody_is_asked_for_a_key(alone, tmp_path):
    said = alone("online", WANDB_INIT_TIMEOUT="5")
    assert "offline" in said and "Enter your choice" not in said
    assert history(RunFolder(tmp_path / "runs/ours").stage("anchor"))[0]["loss"] == 1.0


def test_offline_speaks_to_nobody_and_leaves_nothing_elsewhere(alone, tmp_path):
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        alone("offline", WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert asked == []
    left = [path for name in ("home", "tmp") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert [path for path in left if "wandb" in str(path).lower() or path.name == "provenance.json"] == []


def test_without_a_key_it_is_tracked_offline(config, run, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(run.path))
    monkeypatch.setenv("NETRC", str(run.path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online = config.model_copy(update={"tracking": config.tracking.model_copy(update={"wandb": "online"})})
    with caplog.at_level(logging.WARNING), tracking.tracked(online, run, "anchor") as tracker:
        tracker.hear(lambda row: False)({"step": 1, "loss": 1.0})
    assert "tracked offline" in caplog.text
    assert [row["update"] for row in history(run.stage("anchor"))] == [1]


def test_trouble_in_wandb_does_not_end_a_job(config, run, monkeypatch, caplog):
    with tracking.tracked(config, run, "anchor") as tracker:
        monkeypatch.setattr(wandb.Run, "log", lambda *_: 1 / 0)
        hear = tracker.hear(lambda row: True)
        assert hear({"step": 1, "loss": 1.0}) and hear({"step": 2, "loss": 1.0})
    assert caplog.text.count("the run goes on untracked") == 1


@pytest.mark.parametrize("rank, wanted", [(1, "offline"), (0, "off")])
def test_other_ranks_and_untracked_runs_leave_nothing(config, run, rank, wanted):
    section = config.tracking.model_copy(update={"wandb": wanted})
    with tracking.tracked(config.model_copy(update={"tracking": section}), run, "anchor", rank) as tracker:
        report = object()
        assert tracker.hear(report) is report
        tracker.used(lambda: 1 / 0)  # not even found out
        tracker.made(lambda: 1 / 0)
    assert list(run.stage("anchor").iterdir()) == []


class Online:
    """What of a wandb run with a server is asked for what it is made from."""

    offline = False

    def __init__(self):
        self.used, self.ends = [], []
        self.config = type("Config", (), {"update": lambda _, values, **__: self.used.append(values)})()

    def use_artifact(self, artifact):
        self.used.append((artifact.name, artifact.type, artifact.metadata))

    def define_metric(self, *_, **__):
        pass

    def mark_preempting(self):
        self.ends.append("preempting")

    def finish(self, exit_code):
        self.ends.append(exit_code)


def test_with_a_server_what_was_used_is_an_edge_of_its_graph(config, run, monkeypatch):
    online = Online()
    monkeypatch.setattr(wandb, "init", lambda **_: online)
    with tracking.tracked(config, run, "anchor") as tracker:
        tracker.used(lambda: [tracking.anchor("cd" * 32)])
    assert online.used[-1] == ("ours-anchor", "model", {"anchor_hash": "cd" * 32})
    assert online.ends == [0]


def test_how_a_job_ended(config, run, monkeypatch):
    online = Online()
    monkeypatch.setattr(wandb, "init", lambda **_: online)
    with pytest.raises(ZeroDivisionError), tracking.tracked(config, run, "anchor"):
        1 / 0  # noqa: B018
    monkeypatch.setattr(tracking.preemption, "noticed", lambda: True)
    with tracking.tracked(config, run, "anchor"):
        pass
    assert online.ends == [1, "preempting", 0]
