"""A cluster file for Ray's own launcher (`ray up`), on machines of yours or on AWS, and the script that trains on it.

Machines of yours: the first host is the head and works like the others. AWS: the head has no GPUs; a worker that is
lost is replaced. Everybody who has the token that is made beside the file can run code on the cluster; nobody else can.
"""

import secrets
from pathlib import PurePosixPath
from typing import Any

from launch.cluster.manifest import check_shared, to_yaml, train_script
from launch.cluster.request import Request
from moe.errors import InputError

FILE, SCRIPT, CONFIG, TOKEN = "cluster.yaml", "train.sh", "config.yaml", "auth_token"
PORT = 6379
HEAD_TYPE = "m6i.2xlarge"
TOKEN_PATH = "~/.ray/auth_token"  # where Ray looks for it


def manifest(
    request: Request,
    *,
    hosts: tuple[str, ...] = (),
    instance_type: str | None = None,
    region: str | None = None,
    ssh_user: str | None = None,
    ssh_private_key: str | None = None,
    image: str | None = None,
) -> str:
    """The YAML file. Raises InputError."""
    if not PurePosixPath(request.chdir).is_absolute():
        raise InputError(f"--chdir={request.chdir}: want a folder on storage that all machines share, such as /shared")
    check_shared(request, request.chdir, "the folder of --chdir")
    if bool(hosts) == bool(instance_type):
        raise InputError("--host and --instance-type: want one of them, hosts of yours or what AWS is to start")
    nodes = request.nodes
    if hosts and len(hosts) != nodes.count:
        raise InputError(f"--host is given {len(hosts)} times: want {nodes.count} hosts for {nodes.count} nodes of "
                         f"{nodes.workers} workers")
    if instance_type and not region:
        raise InputError(f"--instance-type={instance_type}: want --region as well, such as us-east-1")
    files = remote_folder(request)
    common = f"--num-cpus={request.cpus} --num-gpus={nodes.gpus}"
    head = common if hosts else "--num-cpus=0 --num-gpus=0"
    start = "ulimit -n 65536; RAY_AUTH_MODE=token ray start --disable-usage-stats"
    auth = {"ssh_user": ssh_user or "ubuntu"} | ({"ssh_private_key": ssh_private_key} if ssh_private_key else {})
    cluster: dict[str, Any] = {
        "cluster_name": request.config.run.name,
        "max_workers": nodes.count - (1 if hosts else 0),
        "provider": {"type": "local", "head_ip": hosts[0], "worker_ips": list(hosts[1:])} if hosts
                    else {"type": "aws", "region": region},
        "auth": auth,
        **({"docker": {"image": image, "container_name": "polyclinic",
                       "run_options": ["--ulimit nofile=65536:65536", "--ulimit memlock=-1"]}} if image else {}),
        "file_mounts": {
            f"{files}/{CONFIG}": str(request.config_file),
            f"{files}/{SCRIPT}": str(request.folder / SCRIPT),
            TOKEN_PATH: str(request.folder / TOKEN),
        },
        "setup_commands": list(request.setup),
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port={PORT} --autoscaling-config=~/ray_bootstrap_config.yaml {head}",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:{PORT} {common}"],
    }  # fmt: skip
    if not hosts:
        # All are started at once and replaced when lost: Ray's autoscaler cannot know that the run would take more.
        resources = {"CPU": request.cpus} | ({"GPU": nodes.gpus} if nodes.gpu else {})
        cluster["available_node_types"] = {
            "head": {"node_config": {"InstanceType": HEAD_TYPE}, "resources": {"CPU": 0}, "min_workers": 0,
                     "max_workers": 0},
            "worker": {"node_config": {"InstanceType": instance_type}, "resources": resources,
                       "min_workers": nodes.count, "max_workers": nodes.count},
        }  # fmt: skip
        cluster["head_node_type"] = "head"
    return to_yaml(cluster)


def script(request: Request) -> str:
    """What runs on the head."""
    return train_script(request, f"{remote_folder(request)}/{CONFIG}", setup=("export RAY_AUTH_MODE=token",))


def token() -> str:
    return secrets.token_hex(32)


def remote_folder(request: Request) -> str:
    """Of the config and the script, on the machines."""
    return f"~/polyclinic-{request.config.run.name}"


def start_command(request: Request) -> str:
    """For a shell on the head."""
    return f"bash -l {remote_folder(request)}/{SCRIPT}"
