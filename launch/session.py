"""The Ray cluster of a run: the one whose address is given, or a local one that lives as long as the run."""

import contextlib
import importlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch import demand
from launch.graph import RunFailed
from moe.config import RunConfig, SpecialtyConfig
from moe.errors import InputError
from moe.train import allocator
from moe.train.watchdog import grace_seconds

if TYPE_CHECKING:
    from launch.room import Node

CONNECT_SECONDS = 5.0
MEND = "start one with `ray start --head`, or leave cluster.address out for a cluster on this machine"

# Set before ray is imported. Workers of a local cluster inherit them; those of another are given them.
ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # our own watch asks for a checkpoint, on every gang
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
    """What a worker has on the cluster."""

    use_gpu: bool
    local: bool  # all on this machine, in a cluster of our own
    device: str  # in words


@contextlib.contextmanager
def session(config: RunConfig) -> Iterator[Capacity]:
    """Connect, or start a local cluster; on the way out disconnect, or stop it.

    Raises InputError for an address nobody answers at, for a cluster too small for one job and for an owner without a
    node, all before anything is started on it, RunFailed where a local one does not start."""
    cluster = config.cluster
    local = cluster.address is None
    # A worker that does not even say that it is alive is frozen: its watchdog cannot end it.
    silence = cluster.hang_seconds + 2 * grace_seconds(cluster.hang_seconds)
    frozen = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(silence)}
    environment = {**ENVIRONMENT, **frozen, **(LOCAL_ENVIRONMENT if local else {})}
    if not local:
        _reach(cluster.address)
    os.environ.update(environment)
    import ray

    # What the driver needs next takes seconds to import, and meanwhile the cluster starts.
    needed = "launch.specialty_run" if isinstance(config, SpecialtyConfig) else "launch.job_run"
    threading.Thread(target=importlib.import_module, args=(needed,), daemon=True).start()
    if local:
        # Logical CPUs: on a small machine the owners still train side by side, sharing the cores.
        side_by_side = [workers * len(jobs) for _, workers, jobs in demand.by_key(config)]
        try:
            ray.init(
                address="local",  # or Ray would take any cluster that runs on this machine
                num_cpus=max(os.cpu_count() or 1, *side_by_side),
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
        from launch.room import nodes  # which imports ray

        resources = ray.cluster_resources()
        use_gpu = resources.get("GPU", 0) >= 1
        check_room(config, nodes(use_gpu, sure=True), use_gpu)
        capacity = Capacity(use_gpu=use_gpu, local=local, device=_device(resources))
        yield capacity
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise InputError for an address of Ray's client, through which nothing of a run can be followed, and where nobody
    listens at HOST:PORT: Ray itself would try for minutes."""
    meant = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address  # as Ray reads it
    if "://" in meant:
        named = f"{address} (RAY_ADDRESS={meant})" if meant != address else address
        raise InputError(f"cluster.address={named}: want HOST:6379 of the cluster's head, or auto, with the command "
                         "run on one of its nodes or submitted there by `ray job submit`, because Ray's client cannot "
                         "follow a run")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return  # such as auto, which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cluster.address={address}: no Ray cluster answers there ({reason}); {MEND}") from error


def check_room(config: RunConfig, nodes: "list[Node]", use_gpu: bool) -> None:
    """Raise InputError where a job of the run could never have its workers on these nodes, however long it waited."""
    from launch.room import most

    _check_owners(config, nodes)
    largest = max((node.slots for node in nodes), default=0)
    worker = "a GPU and a CPU of one node" if use_gpu else "a CPU"
    for key, workers, jobs in demand.by_key(config):
        for job in jobs:
            room = most(nodes, job)
            if job.group > largest:
                raise InputError(f"parallel.expert={job.group}: want at most {largest}, the workers that fit on one "
                                 "node of the cluster, or parallel.across_nodes=true")
            if room < job.least:
                raise InputError(
                    f"the cluster has room for {room} workers{job.places()}, each with {worker}: want {job.least} "
                    f"({key}={workers}, cluster.min_workers="
                    f"{'null' if config.cluster.min_workers is None else config.cluster.min_workers}"
                    f"{f', parallel.expert={job.group}' if job.group > 1 else ''})"
                )


def _check_owners(config: RunConfig, nodes: "list[Node]") -> None:
    """Raise InputError where an owner's text could be read nowhere."""
    key = getattr(config.cluster, "owner_label", None)
    labels = set().union(*(node.labels for node in nodes))
    missing = [name for name in config.owners if (key, name) not in labels] if key else []
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
