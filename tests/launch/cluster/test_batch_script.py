"""The batch scripts, as text and as they run, with stand-ins for everything but the shell."""

import json
import os
import shlex
import signal
import sys
import time

import pytest

from launch.cluster import slurm as scripts

TIMEOUT = 30
JOB = os.getpid()  # whose number its ports follow: several processes may test at once
REQUEUE = f"requeue {JOB}"


@pytest.mark.parametrize("runner", ["ray", "torchrun"])
def test_shellcheck_has_nothing_to_say(ask, shellcheck, runner):
    request = ask("run.folder=a folder/of one's own", setup=("module load cuda",))
    text = scripts.script(request, runner)
    assert shellcheck(text) == ""
    assert "SC2086" in shellcheck(text.replace('requeue "$SLURM_JOB_ID"', "requeue $SLURM_JOB_ID"))


def test_what_sbatch_is_asked(ask):
    request = ask("cluster.workers=16", "cluster.min_workers=8", time="2-00:00:00", memory="900G", cpus_per_worker=6,
                  grace=300)  # fmt: skip
    text = scripts.script(request, "ray", partition="gpu", account="ml", more=("--constraint=h100",))
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {
        "--job-name=first", "--partition=gpu", "--account=ml", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8",
        "--cpus-per-task=48", "--mem=900G", "--time=2-00:00:00", "--signal=B:TERM@300", "--requeue", "--no-kill",
        "--open-mode=append", "--constraint=h100",
    } <= set(options)  # fmt: skip
    assert not any(option.startswith("--qos") for option in options)
    rigid = scripts.script(ask("cluster.workers=16"), "ray").splitlines()
    assert "#SBATCH --no-kill" not in rigid, "a run of one size ends with its nodes"


def test_a_run_without_gpus_asks_for_none(ask):
    assert "--gpus" not in scripts.script(ask(gpus_per_node=0), "torchrun").split("set -eo")[0]


def test_what_the_user_names_is_quoted(ask, tmp_path):
    text = scripts.script(ask(folder=tmp_path / "my $(runs)", chdir=f"{tmp_path}/my work"), "ray")
    assert f'#SBATCH --chdir="{tmp_path}/my work"' in text.splitlines()
    assert f"logs={shlex.quote(str(tmp_path / 'my $(runs)/logs'))}" in text.splitlines()


# --- how they run


@pytest.fixture
def submit(ask, slurm, tmp_path, monkeypatch):
    """A function: write the script and start it; with stand-ins for the programs of the environment."""
    monkeypatch.setattr(sys, "executable", str(slurm.commands / "python"))  # whose folder the script puts on the PATH
    slurm.put("python", 'echo "ready $*"\n')
    # Listens, as the head's Ray does, until it is told to go.
    listens = "import signal, socket, sys; s = socket.create_server(('', int(sys.argv[1]))); signal.pause()"
    slurm.put("ray", f"""\
for each in "$@"; do case $each in --port=*) port=${{each#--port=}} ;; esac; done
exec {shlex.quote(sys.base_prefix)}/bin/python3 -c {shlex.quote(listens)} "$port"
""")
    request = ask(folder=tmp_path / "my out")
    (request.folder / "logs").mkdir(parents=True)
    script = request.folder / "job.sh"

    def started(runner: str):
        script.write_text(scripts.script(request, runner))
        return slurm.start(script, job=JOB)

    return started


def ended(process):
    said = process.communicate(timeout=TIMEOUT)[0]
    return process.returncode, said


WAITS = """\
echo "$*" >>"$SLURM_STUB/calls"
trap 'echo told >>"$SLURM_STUB/calls"; exit 75' TERM
touch "$SLURM_STUB/begun"
while :; do sleep 0.05; done
"""


# Told to go, it takes its time for a checkpoint.
SAVES = """\
echo "$*" >>"$SLURM_STUB/calls"
trap 'echo told >>"$SLURM_STUB/calls"; touch "$SLURM_STUB/told"' TERM
touch "$SLURM_STUB/begun"
until [ -e "$SLURM_STUB/saved" ]; do sleep 0.05; done
exit 75
"""


def until(path, process):
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, ended(process)[1]
        time.sleep(0.02)


def test_a_job_whose_time_is_over_stops_is_queued_again_and_goes_on(submit, slurm, tmp_path):
    slurm.put("polyclinic", SAVES)
    process = submit("ray")
    until(slurm.commands / "begun", process)
    process.send_signal(signal.SIGTERM)
    until(slurm.commands / "told", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)  # in which a second one would be passed on
    assert slurm.requeued == [], "its checkpoint is not written yet"
    (slurm.commands / "saved").touch()
    status, said = ended(process)
    assert status == 75 and slurm.requeued == [REQUEUE], said
    calls = (slurm.commands / "calls").read_text().splitlines()
    assert calls[1:] == ["told"], "once: a second signal would end it without a checkpoint"
    assert "cluster.address=" in calls[0] and "--resume" not in calls[0]

    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/config.yaml").touch()
    slurm.put("polyclinic", 'echo "$*"\n')
    status, said = ended(submit("ray"))
    assert status == 0 and "--resume" in said and "start 2" in said, said
    assert slurm.requeued == [REQUEUE]


@pytest.mark.parametrize("status", [1, 2, 130])
def test_a_run_that_has_failed_is_not_queued_again(submit, slurm, status):
    slurm.put("polyclinic", f"exit {status}\n")
    found, said = ended(submit("ray"))
    assert found == status and slurm.requeued == [] and f"status {status} and is not queued again" in said


def test_a_job_that_is_told_to_go_before_it_trains_is_queued_again(submit, slurm):
    imports = 'if [ "$1" = -c ]; then exit; fi\n'
    slurm.put("python", imports + WAITS.replace("exit 75", "exit 143"))
    slurm.put("polyclinic", 'touch "$SLURM_STUB/trained"\n')
    process = submit("ray")
    until(slurm.commands / "begun", process)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert status == 75 and slurm.requeued == [REQUEUE], said
    assert not (slurm.commands / "trained").exists()


def test_where_ray_does_not_start_the_job_says_so(submit, slurm):
    slurm.put("ray", "exit 1\n")
    status, said = ended(submit("ray"))
    assert status == 1 and "Ray does not start; see" in said and slurm.requeued == []


def test_where_slurm_does_not_queue_it_again_the_way_is_said(submit, slurm):
    slurm.put("polyclinic", "exit 75\n")
    slurm.put("scontrol", "exit 1\n")
    status, said = ended(submit("ray"))
    assert status == 75 and "could not be queued again; to go on: sbatch" in said


def torchrun_that_says(event, step=1):
    """And leaves a checkpoint of that update."""
    line = json.dumps({"event": event, "step": step})
    train = "runs/first/stages/train"
    return (f"mkdir -p {train}/checkpoints/step-0000000{step}\n"
            f"echo {shlex.quote(line)} >>{train}/events.jsonl\nexit 1\n")  # fmt: skip


@pytest.mark.parametrize(
    "event, status, requeued",
    [
        pytest.param("preempted", 75, [REQUEUE], id="stopped-at-a-checkpoint"),
        pytest.param("failed", 1, [], id="failed"),
        pytest.param("refused", 2, [], id="wrong-input"),
    ],
)
def test_what_became_of_ranks_is_in_their_events(submit, slurm, event, status, requeued):
    slurm.put("torchrun", torchrun_that_says(event))
    found, said = ended(submit("torchrun"))
    assert found == status and slurm.requeued == requeued, said


def test_ranks_that_stop_again_and_again_without_an_update_are_given_up(submit, slurm):
    """Of which torchrun is the cause: a rank that is killed as soon as it starts makes it stop the others."""
    slurm.put("torchrun", torchrun_that_says("preempted"))
    assert ended(submit("torchrun"))[0] == 75
    assert ended(submit("torchrun"))[0] == 1 and len(slurm.requeued) == 1


def test_ranks_that_are_told_to_go_are_queued_again_whatever_they_say(submit, slurm):
    slurm.put("torchrun", WAITS.replace("exit 75", "exit 1"))
    process = submit("torchrun")
    until(slurm.commands / "begun", process)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert status == 75 and slurm.requeued == [REQUEUE], said
    assert "--nproc-per-node=2" in (slurm.commands / "calls").read_text()
