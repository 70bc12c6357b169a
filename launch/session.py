"""The Ray cluster of a run: the one whose address is given, or a local one that lives as long as the run."""

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from launch.graph import RunFailed
from moe.config import SpecialtyConfig
from moe.errors import InputError
from moe.train import allocator

# Set before ray is imported. Workers of a local cluster inherit them; those of another are given them.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # fit returns a second after training ends, not three
    "RAY_TRAIN_V2_ENABLED": "1",
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
def session(config: SpecialtyConfig) -> Iterator[Capacity]:
    """Connect, or start a local cluster; on the way out disconnect, or stop it.

    Raises InputError for an address nobody answers at and for a cluster too small for one job, RunFailed where a
    local one does not start."""
    local = config.cluster.address is None
    os.environ.update({**ENVIRONMENT, **(LOCAL_ENVIRONMENT if local else {})})
    import ray

    # What the driver needs next takes seconds to import, and meanwhile the cluster starts.
    threading.Thread(target=importlib.import_module, args=("launch.specialty_run",), daemon=True).start()
    largest = max(config.cluster.anchor_workers, config.cluster.owner_workers)
    if local:
        # Logical CPUs: on a small machine the owners still train side by side, sharing the cores.
        side_by_side = len(config.owners) * config.cluster.owner_workers
        try:
            ray.init(
                address="local",  # or Ray would take any cluster that runs on this machine
                num_cpus=max(os.cpu_count() or 1, largest, side_by_side),
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
                address=config.cluster.address,
                runtime_env={"env_vars": ENVIRONMENT},
                log_to_driver=False,
                logging_level="error",
            )
        except (ConnectionError, ValueError) as error:
            raise InputError(f"cluster.address={config.cluster.address}: no Ray cluster answers there") from error
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        room = gpus or int(resources.get("CPU", 0))
        capacity = Capacity(workers=room, use_gpu=gpus > 0, local=local, device=_device(resources))
        if capacity.workers < largest:
            raise InputError(
                f"the cluster has room for {capacity.workers} workers: want {largest}, the largest of "
                "cluster.anchor_workers and cluster.owner_workers"
            )
        yield capacity
    finally:
        ray.shutdown()


def _device(resources: dict[str, float]) -> str:
    kinds = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    if kinds:
        return f"{int(resources['GPU'])} x {', '.join(kinds)}"
    return f"CPU, {len(os.sched_getaffinity(0))} cores"
