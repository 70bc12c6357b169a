"""`polyclinic launch`: what it writes, whom it calls, and what it says where nobody is to be called."""

import sys
from pathlib import Path

import pytest
import yaml

from launch import cli
from moe.config_file import load


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path, config_file, slurm):
    """A function: run the command in tmp_path, where no cluster's commands are but those that a test puts there; give
    its status, its output and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(slurm.commands))
    monkeypatch.setattr(cli.os, "_exit", sys.exit)

    def run(kind: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyclinic", "launch", kind, str(config_file), *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


KINDS = {
    "slurm": [],
    "torchrun": [],
    "kuberay": ["--image", "polyclinic:1", "--volume", "claim:/shared"],
    "ray": ["--host", "10.0.0.1", "--chdir", "/shared"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_prints_and_leaves_nothing(launch, kind, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, printed, said = launch(kind, "train.steps=7", "--dry-run", *KINDS[kind])
    assert status == 0 and said == "" and sorted(tmp_path.rglob("*")) == before
    assert printed.startswith("#!/usr/bin/env bash\n") if kind in ("slurm", "torchrun") else yaml.safe_load_all(printed)


def test_with_a_folder_the_files_are_there_to_be_looked_at(launch, tmp_path):
    status, printed, said = launch("slurm", "train.steps=7", "--dry-run", "--out", "here")
    assert status == 0 and f"written to {tmp_path}/here/job.sh, and not submitted" in said
    assert (tmp_path / "here/job.sh").read_text() == printed
    config, = (tmp_path / "here").glob("config-*.yaml")
    assert load(config).train.steps == 7 and str(config) in printed
    launch("slurm", "train.steps=8", "--dry-run", "--out", "here")
    assert load(config).train.steps == 7, "a job that waits keeps what it was given"


@pytest.mark.parametrize(
    "kind, program, calls",
    [
        pytest.param("slurm", "sbatch", ["{out}/job.sh"], id="slurm"),
        pytest.param("torchrun", "sbatch", ["{out}/job.sh"], id="torchrun"),
        pytest.param("kuberay", "kubectl", ["create --filename {out}/rayjob.yaml"], id="kuberay"),
        pytest.param("ray", "ray", ["up --yes {out}/cluster.yaml",
                                    "exec --tmux {out}/cluster.yaml bash -l ~/polyclinic-first/train.sh"], id="ray"),
    ],
)  # fmt: skip
def test_it_is_submitted_by_the_program_of_its_kind(launch, slurm, tmp_path, kind, program, calls):
    out = tmp_path / f"runs/first.{kind}"
    status, _, said = launch(kind, *KINDS[kind])
    assert status == 1 and said.count("\n") == 1, said
    assert f"{program} is not on this machine: {out}/" in said and "is written" in said

    slurm.put(program, 'echo "$*" >>"${0%/*}/called"\n')
    status, _, said = launch(kind, *KINDS[kind])
    assert status == 0, said
    assert (slurm.commands / "called").read_text().splitlines() == [call.format(out=out) for call in calls]
    assert (out / "logs").is_dir()

    slurm.put(program, "exit 3\n")
    status, _, said = launch(kind, *KINDS[kind])
    assert status == 1 and "has ended with status 3" in said


def test_the_token_of_a_cluster_is_its_owners(launch, slurm, tmp_path):
    slurm.put("ray", "exit 0\n")
    token = tmp_path / "runs/first.ray/auth_token"
    assert launch("ray", *KINDS["ray"])[0] == 0
    before = token.read_text()
    assert token.stat().st_mode & 0o777 == 0o600 and len(before) == 64
    assert launch("ray", *KINDS["ray"])[0] == 0 and token.read_text() == before


@pytest.mark.parametrize(
    "kind, arguments, part",
    [
        pytest.param("slurm", ["cluster.workers=16", "--gpus-per-node", "6"], "want a multiple of --gpus-per-node=6",
                     id="no-whole-nodes"),
        pytest.param("slurm", ["train.stepz=3"], "did you mean train.steps?", id="typo"),
        pytest.param("slurm", ["domains.first={documents: [absent.jsonl], noise_documents: null}"],
                     "absent.jsonl does not exist", id="no-text"),
        pytest.param("slurm", ["--time", "soon"], "--time=soon", id="time"),
        pytest.param("slurm", ["--resume"], "there is none of that name", id="nothing-to-resume"),
        pytest.param("slurm", ["--sbatch=constraint"], "want an option of sbatch", id="no-option"),
        pytest.param("slurm", ["--chdir", "absent"], "--chdir=absent: want a folder", id="no-folder"),
        pytest.param("kuberay", [], "--image is missing", id="no-image"),
    ],
)  # fmt: skip
def test_a_wrong_input_is_one_sentence_and_nothing_is_written(launch, tmp_path, kind, arguments, part):
    before = sorted(tmp_path.rglob("*"))
    status, _, said = launch(kind, *arguments)
    assert status == 2 and part in said and said.count("\n") == 1, said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_is_there_is_gone_on_with_only_when_asked(launch, tmp_path):
    folder = tmp_path / "runs/first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("x: 1\n")
    status, _, said = launch("slurm", "--dry-run")
    assert status == 2 and "exists: want another run.name, or --resume" in said
    assert launch("slurm", "--dry-run", "--resume")[0] == 0


SPECIALTY = """
model: {d_model: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, d_ff: 24, context_length: 16}
run: {name: first, seed: 1}
tokenizer: {vocab_size: 270}
public: {noise_documents: 20}
owners: {billing: {slot: 1, data: {noise_documents: 20}}}
anchor: &train
  {steps: 2, batch_size: 4, micro_batch_size: 2, learning_rate: 0.01, evaluate_every: 1, checkpoint_every: 1}
pack: {train: *train, replay_share: 0.125}
"""


def test_a_specialty_run_is_for_ray(launch, config_file):
    config_file.write_text(SPECIALTY)
    status, printed, _ = launch("slurm", "--dry-run")
    assert status == 0 and "workers=2\n" in printed
    status, _, said = launch("torchrun", "--dry-run")
    assert status == 2 and "describes a specialty run" in said
    status, _, said = launch("slurm", "--dry-run", "cluster={address: auto, owner_label: owner}")
    assert status == 2 and "belong to no owner" in said


def test_sized_configs_fit_their_nodes(launch, config_file, monkeypatch):
    root = Path(__file__).parents[3]
    for name, nodes in (("mixture-64gpu", 8), ("mixture-8gpu", 1)):
        config_file.write_text(f"extends: {root}/configs/{name}.yaml\n"
                               "domains: {general: {documents: null, noise_documents: 9}, clinical: {documents: null, "
                               "noise_documents: 9}}\n")  # fmt: skip
        status, printed, said = launch("slurm", "--dry-run", "domains.general.documents=[]",
                                       "domains.clinical.documents=[]")  # fmt: skip
        assert status == 0 and f"#SBATCH --nodes={nodes}\n" in printed, said
