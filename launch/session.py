"""The Ray cluster of a run: the one whose address is given, or a local one that lives as long as the run."""

import contextlib
import importlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.graph import RunFailed
from moe.config import RunConfig, SpecialtyConfig
from moe.errors import InputError
from moe.train import allocator
from moe.train.watchdog import grace_seconds

CONNECT_SECONDS = 5.0
MEND = "start one with `ray start --head`, or leave cluster.address out for a cluster on this machine"

# Set before ray is imported. Workers of a local cluster inherit them; those of another are given them.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # fit returns a second after training ends, not three
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # to find places for workers; then the cluster is looked at again
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled, and importing the compiler takes seconds in every process
}
LOCAL_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's own 15 starves a run on a machine that does anything else
    "RAY_AUTH_MODE": "disabled",  # a cluster of one machine, bound to the loopback
    "RAY_worker_maximum_startup_concurrency": "16",  # the processes of all owners at once, without a warning
    **allocator.ENVIRONMENT,
}


@dataclass(frozen=True)
class Capacity:
    """How many training workers fit on the cluster at once."""

    workers: int
    use_gpu: bool
    local: bool  # all on this machine, in a cluster of our own
    device: str  # in words


@contextlib.contextmanager
def session(config: RunConfig) -> Iterator[Capacity]:
    """Connect, or start a local cluster; on the way out disconnect, or stop it.

    Raises InputError for an address nobody answers at, for a cluster too small for one job and for an owner without a
    node, RunFailed where a local one does not start."""
    cluster = config.cluster
    local = cluster.address is None
    # A worker that does not even say that it is alive is frozen: its watchdog cannot end it.
    silence = cluster.hang_seconds + 2 * grace_seconds(cluster.hang_seconds)
    frozen = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(silence)}
    environment = {**ENVIRONMENT, **frozen, **(LOCAL_ENVIRONMENT if local else {})}
    os.environ.update(environment)
    if not local:
        _reach(cluster.address)
    import ray

    # What the driver needs next takes seconds to import, and meanwhile the cluster starts.
    needed = "launch.specialty_run" if isinstance(config, SpecialtyConfig) else "launch.job_run"
    threading.Thread(target=importlib.import_module, args=(needed,), daemon=True).start()
    jobs = _jobs(config)
    if local:
        # Logical CPUs: on a small machine the owners still train side by side, sharing the cores.
        try:
            ray.init(
                address="local",  # or Ray would take any cluster that runs on this machine
                num_cpus=max(os.cpu_count() or 1, *(workers * side_by_side for workers, side_by_side in jobs.values())),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
        except Exception as error:  # Ray has no type of its own for "not within 30 seconds"
            reason = str(error).strip().splitlines()[0]
            raise RunFailed(f"no local Ray cluster could be started; is the machine overloaded? {reason}") from error
    else:
        try:
            ray.init(
                address=cluster.address,
                runtime_env={"env_vars": environment},
                log_to_driver=False,
                logging_level="error",
            )
        except (ConnectionError, ValueError) as error:
            raise InputError(f"cluster.address={cluster.address}: no Ray cluster answers there; {MEND}") from error
    ray._private.worker._worker_logs_enabled = False  # else it prints a page for every worker that dies; a gang says it
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        room = gpus or int(resources.get("CPU", 0))
        capacity = Capacity(workers=room, use_gpu=gpus > 0, local=local, device=_device(resources))
        for key, (workers, _) in jobs.items():
            least = min(cluster.sizes(workers))
            if capacity.workers < least:
                raise InputError(
                    f"the cluster has room for {capacity.workers} workers: want {least} ({key}={workers}, "
                    f"cluster.min_workers={'null' if cluster.min_workers is None else cluster.min_workers})"
                )
        _check_owners(config, ray.nodes())
        yield capacity
    finally:
        ray.shutdown()


def _jobs(config: RunConfig) -> dict[str, tuple[int, int]]:
    """By key: workers of one job, and how many such jobs run side by side."""
    cluster = config.cluster
    if isinstance(config, SpecialtyConfig):
        owners = len(config.owners)
        return {
            "cluster.anchor_workers": (cluster.anchor_workers, 1),
            "cluster.owner_workers": (cluster.owner_workers, owners),
        }
    return {"cluster.workers": (cluster.workers, 1)}


def _reach(address: str) -> None:
    """Raise InputError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return  # such as auto, which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cluster.address={address}: no Ray cluster answers there ({reason}); {MEND}") from error


def _check_owners(config: RunConfig, nodes: list[dict[str, Any]]) -> None:
    """Raise InputError where an owner's text could be read nowhere."""
    key = getattr(config.cluster, "owner_label", None)
    labels = [node.get("Labels") or {} for node in nodes if node["Alive"]]
    missing = [name for name in config.owners if all(of.get(key) != name for of in labels)] if key else []
    if missing:
        raise InputError(
            f"cluster.owner_label={key}: no live node is labelled {', '.join(f'{key}={name}' for name in missing)}; "
            f"on a node of that owner, `ray start --address={config.cluster.address} --labels={key}={missing[0]}`"
        )


def _device(resources: dict[str, float]) -> str:
    kinds = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    if kinds:
        return f"{int(resources['GPU'])} x {', '.join(kinds)}"
    return f"CPU, {len(os.sched_getaffinity(0))} cores"
