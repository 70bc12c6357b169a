"""A RayJob for KubeRay 1.5.1 or newer, and a ConfigMap with what it runs.

The head has no GPUs and no workers; each worker pod is a whole node of the run. A pod that is taken away says so to Ray
first, and its job goes on from a checkpoint on the others, or on its successor. Where the head is lost, KubeRay starts
a new cluster, `backoffLimit` times, and the run goes on there; what has failed for good ends at once where it is
started again.
"""

import hashlib
import math
import re
from importlib.metadata import version
from typing import Any

from launch.cluster.manifest import check_shared, to_yaml, train_script
from launch.cluster.request import Request, gibibytes, seconds
from moe.errors import InputError

FILE = "rayjob.yaml"
MOUNT = "/etc/polyclinic"  # of the ConfigMap
LONGEST_NAME = 47  # that KubeRay takes for a RayJob
HEAD = {"cpu": "4", "memory": "16Gi"}  # the driver, and Ray's own services
WORKER_GIBIBYTES = 64  # of memory, where nothing else is said
SHARED_MEMORY = 0.25  # of a pod's memory: Ray's object store and NCCL
KEPT_SECONDS = 600  # for which the pods of a job that has ended can be looked at

LEAVE = """\
timeout 20 ray drain-node --address="$RAY_ADDRESS" --reason=DRAIN_NODE_REASON_PREEMPTION \
--reason-message="the pod is taken away" --deadline-remaining-seconds={grace} || exit 0
while pgrep -x raylet >/dev/null; do sleep 1; done"""


def manifest(
    request: Request,
    launch_id: str,
    *,
    image: str | None,
    volume: str | None,
    namespace: str | None = None,
    service_account: str | None = None,
    node_selector: tuple[str, ...] = (),
) -> str:
    """YAML of both objects. `volume` is CLAIM:PATH, a volume that all pods share and where they have it; `launch_id`
    tells this launch from others of the run. Raises InputError."""
    if not image:
        raise InputError("--image is missing: want a container image with polyclinic and ray[default] in it")
    claim, path = _volume(volume)
    check_shared(request, path, "the path of --volume")
    if request.setup:
        raise InputError(f"--setup {request.setup[0]!r}: want it in the image instead")
    name = object_name(request.config.run.name)
    folder = request.config.run.path
    failed = folder.with_name(f"{folder.name}.failed-{launch_id}")
    script = train_script(request, f"{MOUNT}/config.yaml", failed=str(failed))
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    selector = dict(_pair(each) for each in node_selector)

    def pod(container: str, resources: dict[str, Any], **more: Any) -> dict[str, Any]:
        shared_memory = math.ceil(SHARED_MEMORY * gibibytes(resources["memory"].removesuffix("i")))
        return {"spec": {
            **({"serviceAccountName": service_account} if service_account else {}),
            "restartPolicy": "Never",  # a new pod knows that it is new: Ray takes a restarted one for the old
            "terminationGracePeriodSeconds": request.grace,
            "containers": [{
                "name": container,
                "image": image,
                "resources": {"requests": dict(resources), "limits": dict(resources)},
                "volumeMounts": [
                    {"name": "shared", "mountPath": path},
                    {"name": "polyclinic", "mountPath": MOUNT, "readOnly": True},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
                **more,
            }],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
                {"name": "polyclinic", "configMap": {"name": name}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_memory}Gi"}},
            ],
        }}  # fmt: skip

    nodes = request.nodes
    gibi = gibibytes(request.memory) if request.memory else WORKER_GIBIBYTES * nodes.workers
    resources = {"cpu": str(request.cpus), "memory": f"{math.ceil(gibi)}Gi"}
    worker = pod(
        "worker",
        resources | ({"nvidia.com/gpu": str(nodes.gpus)} if nodes.gpu else {}),
        lifecycle={"preStop": {"exec": {"command": ["/bin/bash", "-lc", LEAVE.format(grace=request.grace)]}}},
    )
    if nodes.gpu:
        worker["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if selector:
        worker["spec"]["nodeSelector"] = selector
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": f"bash {MOUNT}/train.sh",
            "backoffLimit": request.max_restarts,
            **({"activeDeadlineSeconds": seconds(request.time)} if request.time else {}),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},  # no worker runs on it
                    "template": pod("head", HEAD),
                },
                "workerGroupSpecs": [{
                    "groupName": "workers",
                    "replicas": nodes.count,
                    "minReplicas": nodes.least,
                    "maxReplicas": nodes.count,
                    "rayStartParams": {"num-cpus": str(request.cpus), "num-gpus": str(nodes.gpus)},
                    "template": worker,
                }],
            },
        },
    }  # fmt: skip
    data = {"config.yaml": request.config_text, "train.sh": script}
    return to_yaml({"apiVersion": "v1", "kind": "ConfigMap", "metadata": dict(metadata), "data": data}, job)


def object_name(run: str) -> str:
    """A name that Kubernetes takes, of the run's; another one where it had to be changed."""
    name = re.sub(r"[^a-z0-9-]", "-", run.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if name == run and len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 7].rstrip('-')}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"


def _volume(volume: str | None) -> tuple[str, str]:
    claim, _, path = (volume or "").partition(":")
    if not claim or not path.startswith("/"):
        raise InputError(f"--volume{f'={volume}' if volume else ' is missing'}: want CLAIM:/PATH, a persistent volume "
                         "claim that all pods can write to, for the data and the run's folder")
    return claim, path.rstrip("/") or "/"


def _pair(selector: str) -> tuple[str, str]:
    key, equals, value = selector.partition("=")
    if not key or not equals:
        raise InputError(f"--node-selector={selector}: want LABEL=VALUE, such as gpu=h100")
    return key, value
