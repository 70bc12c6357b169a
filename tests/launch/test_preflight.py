"""`polyclinic preflight`: what each check of the machine and of the software says, and what the command makes of it."""

import json
import resource
import socket
import sys

import pytest

from launch import cli
from launch.preflight import checks, machine, nodes, software
from launch.preflight.finding import Finding
from launch.preflight.nodes import Answer
from moe.config_file import load
from moe.data.demonstration import packages
from moe.errors import InputError

GB = 1e9


@pytest.mark.parametrize(
    "torch, triton, requirements, state",
    [
        pytest.param("2.13.0+cpu", "3.7.1", [], "ok", id="seen"),
        pytest.param("2.13.0", "3.6.0", [], "wrong", id="too-old"),
        pytest.param("2.20.0", "4.0.0", [], "warning", id="not-seen"),
        pytest.param("2.20.0", "4.0.0", ["filelock", "triton==4.0.0; platform_system == 'Linux'"], "ok", id="its-own"),
        pytest.param("2.20.0", "4.0.1", ["triton (==4.0.0)"], "wrong", id="not-its-own"),
        pytest.param("2.13.0", None, [], "wrong", id="missing"),
    ],
)
def test_triton_is_that_of_torch(torch, triton, requirements, state):
    assert software.triton(torch, triton, requirements).state == state


@pytest.mark.parametrize(
    "driver, torch, usable, state, part",
    [
        pytest.param((13, 0), "12.8", True, "ok", "driver knows 13.0", id="newer-driver"),
        pytest.param((12, 4), "12.8", True, "warning", "at run time", id="same-major"),
        pytest.param((12, 4), "13.0", True, "wrong", "built for CUDA 13.0", id="older-driver"),
        pytest.param((12, 8), None, False, "wrong", "CPU build", id="cpu-build"),
        pytest.param((12, 8), "12.8", False, "wrong", "cannot use it", id="does-not-work"),
    ],
)
def test_torch_and_the_driver_match(driver, torch, usable, state, part):
    finding = software.match(driver, torch, usable)
    assert finding.state == state and part in finding.what


def test_packages_of_our_names_are_found():
    assert software.names({}).state == "ok"
    assert software.names({"kernels": ["polyclinic"]}).state == "ok"
    finding = software.names({"kernels": ["kernels", "polyclinic"], "numpy": ["numpy"]})
    assert finding.state == "wrong" and "pip uninstall kernels" in finding.mend


def test_missing_packages_are_named():
    assert software.installed({"torch": "2.13.0", "ray": None}).what == "torch 2.13.0, ray missing"
    assert software.installed({"torch": "2.13.0", "ray": None}).state == "wrong"


@pytest.mark.parametrize(
    "free, needed, state",
    [(500 * GB, 300 * GB, "warning"), (700 * GB, 300 * GB, "ok"), (200 * GB, 300 * GB, "wrong"), (GB, None, "ok")],
)
def test_space_is_held_against_checkpoints(tmp_path, free, needed, state):
    finding = machine.space(tmp_path, free, needed, checkpoints=3)
    assert finding.state == state
    assert needed is None or "needs about 300.0 GB for 3 checkpoints" in finding.what


def test_a_disk_is_tried_where_the_run_will_be_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROBE_BYTES", 2**20)
    found = machine.disk(tmp_path / "not/yet/there", needed=1.0, checkpoints=1)
    assert [finding.name for finding in found] == ["disk space", "disk speed"] and list(tmp_path.iterdir()) == []
    assert found[0].state == "ok" and str(tmp_path) in found[1].what
    monkeypatch.setattr(machine, "write_speed", denied)
    assert [finding.state for finding in machine.disk(tmp_path, None, 1)] == ["wrong"]


def denied(_):
    raise PermissionError(13, "Permission denied")


def test_a_slow_disk_is_said():
    finding = machine.pace("/here", 50.0, checkpoint=100 * GB)
    assert finding.state == "warning" and "33 min for a checkpoint" in finding.what


@pytest.mark.parametrize("size, state", [(64 * 2**20, "wrong"), (16 * GB, "ok")])
def test_the_shared_memory_of_a_bare_container_is_too_small(size, state):
    assert machine.shared_memory(size).state == state


@pytest.mark.parametrize(
    "soft, hard, state, part",
    [
        pytest.param(1024, 1048576, "wrong", "ulimit -n 65536", id="few"),
        pytest.param(8192, 8192, "warning", "limits.conf", id="not-allowed"),
        pytest.param(65536, 65536, "ok", "", id="enough"),
        pytest.param(resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok", "", id="unlimited"),
    ],
)
def test_files_are_enough(soft, hard, state, part):
    finding = machine.open_files(soft, hard)
    assert finding.state == state and part in finding.mend


def test_infiniband_wants_memory_locked():
    assert machine.locked_memory(infiniband=False, soft=8 * 2**20).state == "ok"
    assert machine.locked_memory(infiniband=True, soft=8 * 2**20).state == "wrong"
    assert machine.locked_memory(infiniband=True, soft=resource.RLIM_INFINITY).state == "ok"


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        finding = machine.ports({port: "Ray"})
    assert finding.state == "warning" and f"{port} (Ray)" in finding.what
    assert machine.ports({port: "Ray"}).state == "ok"


def test_a_name_that_means_this_machine_only_is_said():
    assert machine.hostname(["127.0.1.1", "::1"]).state == "warning"
    assert machine.hostname(["10.0.0.4", "127.0.1.1"]).state == "ok"


def test_a_clock_that_was_never_set_is_wrong():
    assert machine.clock(0.0).state == "wrong" and machine.clock().state == "ok"


def test_a_compiler_is_needed_with_a_gpu(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert machine.compiler(needed=True).state == "wrong"
    assert machine.compiler(needed=False).state == "warning"


def test_the_corpus_is_there_with_its_licences(config_file, monkeypatch):
    demonstration = load(config_file, ["owners.radiology.data={demonstration: radiology, noise_documents: null}"])
    found = {finding.name: finding for finding in software.corpus(demonstration)}
    assert set(found) == {"text of public", "text of billing", "corpus of radiology"}
    assert found["corpus of radiology"].state == "ok" and "public domain" in found["corpus of radiology"].what
    monkeypatch.setattr(packages, "installed_version", lambda package: None)
    assert [each.state for each in software.corpus(demonstration) if each.name.startswith("corpus")] == ["wrong"]
    assert {each.state for each in software.corpus(None)} == {"warning"}


def test_text_that_is_not_there_is_wrong(config_file):
    finding = software.corpus(load(config_file, ["public.documents=[absent.jsonl]"]))[0]
    assert finding.state == "wrong" and "absent.jsonl does not exist" in finding.what and finding.mend == "mend public"


def test_a_key_is_wanted_only_where_it_is_used(config_file, tmp_path):
    assert software.wandb(load(config_file), {}, tmp_path).state == "skipped"
    online = load(config_file, ["tracking.wandb=online"])
    assert software.wandb(online, {}, tmp_path).state == "wrong"
    finding = software.wandb(online, {"WANDB_API_KEY": "very-secret"}, tmp_path)
    assert finding.state == "ok" and "very-secret" not in finding.what
    for host in ("api.wandb.ai", "api.forge.coreweave.com"):
        (tmp_path / ".netrc").write_text(f"machine {host} login user password very-secret\n")
        assert software.wandb(online, {}, tmp_path).state == "ok"
    own = {"WANDB_BASE_URL": "https://wandb.hospital.example/"}
    assert "wandb.hospital.example" in software.wandb(online, own, tmp_path).what
    (tmp_path / "elsewhere").write_text("machine wandb.hospital.example login user password very-secret\n")
    assert software.wandb(online, own | {"NETRC": str(tmp_path / "elsewhere")}, tmp_path).state == "ok"


def test_checkpoints_are_counted_from_the_config(config_file):
    needed, count = checks.space(load(config_file))
    assert count == 3 and needed % 12 == 0
    assert checks.space(load(config_file, ["anchor.optimizer=sgd"]))[0] < needed


# --- several nodes


def answer(host, skew=0.0, bound=0.01, versions="torch 2.13.0"):
    return Answer(host, (Finding("versions", "ok", versions), Finding("GPUs", "ok", "8 x H100")), skew, bound)


def test_nodes_that_are_alike_are_ok():
    found = nodes.across([answer("a"), answer("b", skew=0.2), answer("c", skew=-0.3)])
    assert [finding.state for finding in found] == ["ok"] * 4 and "0.50 s apart" in found[-1].what


def test_a_node_that_differs_is_named():
    found = {f.name: f for f in nodes.across([answer("a"), answer("b", versions="torch 2.12.0"), answer("c")])}
    assert found["same versions"].state == "wrong" and found["same versions"].what.startswith("b: torch 2.12.0; ")
    late = {f.name: f for f in nodes.across([answer("a"), answer("b", skew=-5.0), answer("c")])}
    assert late["same time"].state == "warning" and "ahead of b" in late["same time"].what
    unsure = {f.name: f for f in nodes.across([answer("a"), answer("b", skew=-5.0, bound=6.0)])}
    assert unsure["same time"].state == "ok"


def test_a_node_that_does_not_answer_is_named():
    found = nodes.across([answer("a"), Answer("b", error="ModuleNotFoundError: No module named 'moe'")])
    assert found[0].state == "wrong" and "b cannot be checked (ModuleNotFoundError" in found[0].what


def test_nodes_of_one_host_are_told_apart():
    assert nodes.named({"0a1b2c3d": "a", "4e5f6a7b": "a", "8c9d": "b"}) == {
        "0a1b2c3d": "a (0a1b2c)", "4e5f6a7b": "a (4e5f6a)", "8c9d": "b"}  # fmt: skip


def test_where_no_cluster_answers_it_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(InputError, match=f"--address=127.0.0.1:{port}: no Ray cluster answers there"):
        nodes.ask(f"127.0.0.1:{port}", None)


# --- the command


@pytest.fixture
def preflight(monkeypatch, capsys):
    """A function: run the command; give its status and output."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["polyclinic", "preflight", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, capsys.readouterr().out

    return run


def found(*findings):
    return lambda config: list(findings)


OK, BAD = Finding("open files", "ok", "65536"), Finding("clock", "wrong", "it says 1970", "set it")
WARNED = Finding("ports", "warning", "6379 (Ray) in use", "end it")


def test_the_status_says_whether_something_is_wrong(preflight, monkeypatch):
    monkeypatch.setattr(checks, "run", found(OK, WARNED))
    assert preflight()[0] == 0
    monkeypatch.setattr(checks, "run", found(OK, BAD))
    status, printed = preflight()
    assert status == 1
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["ok", "open", "files", "65536"] and lines[1][:2] == ["wrong", "clock"]
    assert lines[2] == ["→", "set", "it"]


def test_json_is_for_scripts(preflight, monkeypatch):
    monkeypatch.setattr(checks, "run", found(OK, BAD))
    status, printed = preflight("--json")
    said = json.loads(printed)
    assert status == 1 and not said["ok"] and [check["state"] for check in said["checks"]] == ["ok", "wrong"]
    assert said["checks"][1]["mend"] == "set it"


def test_nodes_share_a_row_that_names_where_it_is_wrong(preflight, monkeypatch):
    def asked(address, config):
        return [Answer("a", (OK, BAD)), Answer("b", (OK, Finding("clock", "ok", "2026"))), Answer("c", (OK, BAD))]

    monkeypatch.setattr(nodes, "ask", asked)
    status, printed = preflight("--address", "auto")
    rows = [line for line in printed.splitlines() if "clock" in line]
    assert status == 1 and len(rows) == 1 and "a, c: it says 1970" in rows[0]


def test_a_config_that_is_wrong_is_a_wrong_input(preflight, tmp_path):
    assert preflight(tmp_path / "absent.yaml")[0] == 2


def test_all_of_it_here(preflight, config_file, monkeypatch):
    monkeypatch.setattr(machine, "PROBE_BYTES", 2**20)
    status, printed = preflight(config_file, "--json")
    said = json.loads(printed)
    names = [check["name"] for check in said["checks"]]
    assert len(set(names)) == len(names) and {"versions", "disk space", "text of public", "W&B"} <= set(names)
    assert status == (0 if said["ok"] else 1)
    assert next(check for check in said["checks"] if check["name"] == "package names")["state"] == "ok", said
