"""`polyclinic launch`: write what starts a run on a cluster, and submit it. Needs no GPU."""

import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launch.graph import RunFailed
from moe.errors import InputError

if TYPE_CHECKING:
    from launch.cluster.request import Request
    from moe.config import RunConfig

app = typer.Typer(no_args_is_help=True, help="Start a run on a cluster: under Slurm, with Ray or plain torchrun; on "
                  "Kubernetes; on machines that Ray's launcher starts.\n\n"
                  "Example: polyclinic launch slurm configs/mixture-64gpu.yaml --partition gpu")  # fmt: skip

Config = Annotated[Path, typer.Argument(help="A YAML file, such as configs/mixture-64gpu.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=100.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the files; default: the run's folder and the kind's name.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")]
GpusPerNode = Annotated[int | None, typer.Option(min=0, help="Workers of a node, each with a GPU; 0: workers without. "
                                                             "Default: 8, or all where there are fewer.")]
NumNodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Default: as many as the workers fill.")]
CpusPerWorker = Annotated[int | None, typer.Option(min=1, help="Default: 8, without GPUs 1.")]
Memory = Annotated[str | None, typer.Option("--mem", help="Of a node, such as 512G.")]
Time = Annotated[str | None, typer.Option(help="After which the run is stopped at a checkpoint, as D-HH:MM:SS.")]
Grace = Annotated[int, typer.Option(min=10, help="Seconds for that checkpoint.")]
Setup = Annotated[list[str] | None, typer.Option(help="A shell line to run first, such as 'module load cuda'.")]
MaxRestarts = Annotated[int, typer.Option(min=0, help="Starts anew after a failure that this run survives.")]
Chdir = Annotated[str | None, typer.Option(help="Folder that the config's relative paths mean; default: this one.")]
Partition = Annotated[str | None, typer.Option(help="Slurm's partition.")]
Account = Annotated[str | None, typer.Option(help="Slurm's account.")]
Qos = Annotated[str | None, typer.Option(help="Slurm's quality of service.")]
Sbatch = Annotated[list[str] | None, typer.Option(help="Another option of sbatch, as --sbatch=--constraint=h100.")]
Image = Annotated[str | None, typer.Option(help="Container image with polyclinic and ray[default] in it.")]


@app.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    gpus_per_node: GpusPerNode = None,
    nodes: NumNodes = None,
    cpus_per_worker: CpusPerWorker = None,
    mem: Memory = None,
    time: Time = "24:00:00",
    grace: Grace = 120,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    setup: Setup = None,
    sbatch: Sbatch = None,
    chdir: Chdir = None,
) -> None:
    """Train what CONFIG describes under Slurm, on a Ray cluster over the job's nodes.

    At the end of its time, and when it is pre-empted, it stops at a checkpoint and is queued again.

    Example: polyclinic launch slurm configs/mixture-64gpu.yaml --partition gpu --account ml --time 2-00:00:00
    """
    request = _request("slurm", config, overrides, out, chdir, resume, gpus_per_node, nodes, cpus_per_worker,
                       memory=mem, time=time, grace=grace, setup=tuple(setup or ()))  # fmt: skip
    _slurm(request, "ray", dry_run, out, partition, account, qos, sbatch)


@app.command()
def torchrun(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    gpus_per_node: GpusPerNode = None,
    nodes: NumNodes = None,
    cpus_per_worker: CpusPerWorker = None,
    mem: Memory = None,
    time: Time = "24:00:00",
    grace: Grace = 120,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    max_restarts: MaxRestarts = 3,
    setup: Setup = None,
    sbatch: Sbatch = None,
    chdir: Chdir = None,
) -> None:
    """Train the one job that CONFIG describes under Slurm, by torchrun on each node, without Ray.

    At the end of its time, and when it is pre-empted, it stops at a checkpoint and is queued again.

    Example: polyclinic launch torchrun configs/mixture-8gpu.yaml --partition gpu
    """
    from moe.config import JobConfig

    request = _request("torchrun", config, overrides, out, chdir, resume, gpus_per_node, nodes, cpus_per_worker,
                       memory=mem, time=time, grace=grace, setup=tuple(setup or ()),
                       max_restarts=max_restarts)  # fmt: skip
    if not isinstance(request.config, JobConfig):
        raise InputError(f"{config} describes a specialty run: want one training job, or `polyclinic launch slurm`")
    _slurm(request, "torchrun", dry_run, out, partition, account, qos, sbatch)


@app.command()
def kuberay(
    config: Config,
    overrides: Overrides = None,
    image: Image = None,
    volume: Annotated[str | None, typer.Option(help="CLAIM:/PATH, a volume claim that all pods share, for the data and "
                                                    "the run's folder.")] = None,
    dry_run: DryRun = False,
    out: Out = None,
    gpus_per_node: GpusPerNode = None,
    nodes: NumNodes = None,
    cpus_per_worker: CpusPerWorker = None,
    mem: Memory = None,
    time: Time = None,
    grace: Grace = 120,
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="Of the objects.")] = None,
    service_account: Annotated[str | None, typer.Option(help="Of the pods.")] = None,
    node_selector: Annotated[list[str] | None, typer.Option(help="LABEL=VALUE of the workers' nodes.")] = None,
    max_restarts: MaxRestarts = 3,
    chdir: Annotated[str | None, typer.Option(help="Folder in the pods that the config's relative paths mean; default: "
                                                   "the volume's.")] = None,
) -> None:
    """Train what CONFIG describes on Kubernetes, as a RayJob of KubeRay. Where the run is there, it is gone on with.

    Example: polyclinic launch kuberay configs/mixture-64gpu.yaml --image registry/polyclinic:1 --volume shared:/shared
    """
    from launch.cluster import kuberay as jobs

    request = _request("kuberay", config, overrides, out, chdir or (volume or "").partition(":")[2] or "/", None,
                       gpus_per_node, nodes, cpus_per_worker, memory=mem, time=time, grace=grace,
                       max_restarts=max_restarts)  # fmt: skip
    text = jobs.manifest(request, _stamp(), image=image, volume=volume, namespace=namespace,
                         service_account=service_account, node_selector=tuple(node_selector or ()))  # fmt: skip
    file = request.folder / jobs.FILE
    if _written(dry_run, out, {file: text}, file):
        _submit(["kubectl", "create", "--filename", str(file)], file)


@app.command("ray")
def ray_up(
    config: Config,
    overrides: Overrides = None,
    chdir: Annotated[str, typer.Option(help="Folder on storage that all machines share, which the config's relative "
                                            "paths mean.")] = "",
    host: Annotated[list[str] | None, typer.Option(help="A machine of yours; the first is the head. Once for each "
                                                        "node.")] = None,
    instance_type: Annotated[str | None, typer.Option(help="What AWS is to start, such as p5.48xlarge.")] = None,
    region: Annotated[str | None, typer.Option(help="Of AWS, such as us-east-1.")] = None,
    ssh_user: Annotated[str | None, typer.Option(help="Default: ubuntu.")] = None,
    ssh_private_key: Annotated[str | None, typer.Option(help="A file.")] = None,
    image: Image = None,
    dry_run: DryRun = False,
    out: Out = None,
    gpus_per_node: GpusPerNode = None,
    nodes: NumNodes = None,
    cpus_per_worker: CpusPerWorker = None,
    setup: Setup = None,
) -> None:
    """Start machines by Ray's cluster launcher, and train on them what CONFIG describes. Where the run is there, it is
    gone on with. The machines stay until `ray down`.

    Example: polyclinic launch ray configs/mixture-8gpu.yaml --host 10.0.0.4 --chdir /shared
    """
    from launch.cluster import ray_up as machines

    request = _request("ray", config, overrides, out, chdir, None, gpus_per_node, nodes, cpus_per_worker,
                       setup=tuple(setup or ()))  # fmt: skip
    text = machines.manifest(request, hosts=tuple(host or ()), instance_type=instance_type, region=region,
                             ssh_user=ssh_user, ssh_private_key=ssh_private_key, image=image)  # fmt: skip
    file = request.folder / machines.FILE
    files = {file: text, request.folder / machines.SCRIPT: machines.script(request),
             request.config_file: request.config_text}  # fmt: skip
    if _written(dry_run, out, files, file, secret={request.folder / machines.TOKEN: machines.token}):
        _submit(["ray", "up", "--yes", str(file)], file)
        _submit(["ray", "exec", "--tmux", str(file), machines.start_command(request)], file)
        _say(f"training in tmux on the head: `ray attach --tmux {shlex.quote(str(file))}` shows it, `ray down` with "
             "the same file ends the machines")


def _request(
    kind: str,
    path: Path,
    overrides: list[str] | None,
    out: Path | None,
    chdir: str | None,
    resume: bool | None,
    gpus_per_node: int | None,
    num_nodes: int | None,
    cpus_per_worker: int | None,
    **more: object,
) -> "Request":
    """Check everything that can be known here. `resume` is None where the run's folder is not on this machine."""
    from launch.cluster import nodes, request
    from moe.config_file import load
    from moe.train import engine_settings

    config = load(path, overrides or [])
    engine_settings.check(config)
    asked = nodes.of(config, gpus_per_node, num_nodes)
    folder = (out or config.run.folder / f"{config.run.name}.{kind}").resolve()
    cpus = cpus_per_worker or (8 if asked.gpu else 1)
    made = request.Request(config, asked, folder, str(Path.cwd()) if chdir is None else chdir, cpus)
    made = replace(made, **more)
    request.check(made)
    if resume is not None:
        _check_here(made.config, Path(made.chdir), resume)
    return made


def _check_here(config: "RunConfig", chdir: Path, resume: bool) -> None:
    """What `polyclinic train` would refuse, before it has waited in a queue."""
    from moe import run_start
    from moe.run_folder import RunFolder

    if not chdir.is_dir():
        raise InputError(f"--chdir={chdir}: want a folder, on storage that all nodes share")
    if chdir.resolve() != Path.cwd():
        return  # relative paths mean others there
    run_start.check(config)
    run_start.check_folder(RunFolder(config.run.path), config, resume)


def _slurm(request: "Request", runner: str, dry_run: bool, out: Path | None, partition: str | None,
           account: str | None, qos: str | None, sbatch: list[str] | None) -> None:
    from launch.cluster import slurm as scripts

    text = scripts.script(request, runner, partition=partition, account=account, qos=qos, more=tuple(sbatch or ()))
    file = request.folder / scripts.SCRIPT
    if not _written(dry_run, out, {file: text, request.config_file: request.config_text}, file):
        return
    _submit(["sbatch", str(file)], file)
    logs = request.folder / scripts.LOGS
    _say(f"its logs: {logs}; to stop it at a checkpoint: scancel --signal=TERM --batch JOB, and scancel JOB when it is "
         "queued again")


def _written(dry_run: bool, out: Path | None, files: dict[Path, str], shown: Path,
             secret: dict[Path, Callable[[], str]] | None = None) -> bool:
    """Write the files, unless they are only to be looked at; whether they are to be submitted. A secret is made once
    and kept to its owner."""
    if dry_run:
        print(files[shown], end="")
    if dry_run and out is None:
        return False
    try:
        (shown.parent / "logs").mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        for path, make in (secret or {}).items():
            if not path.exists():
                path.touch(mode=0o600)
                path.write_text(make(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{shown.parent} cannot be written: {error.strerror}") from error
    if dry_run:
        _say(f"written to {shown}, and not submitted")
    return not dry_run


def _submit(command: list[str], file: Path) -> None:
    """Raises RunFailed where it could not be."""
    if shutil.which(command[0]) is None:
        raise RunFailed(f"{command[0]} is not on this machine: {file} is written; where it is, `{shlex.join(command)}`")
    status = subprocess.run(command).returncode
    if status:
        raise RunFailed(f"`{shlex.join(command)}` has ended with status {status}; {file} is written")


def _stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def _say(sentence: str) -> None:
    Console(stderr=True).print(f"polyclinic: {sentence}", soft_wrap=True, highlight=False, markup=False)
