"""The manifests for KubeRay and for Ray's launcher, against schemas, and what a user may get wrong in them.

The schema of the RayJob is a strict one of the fields that are used, written after KubeRay's types: nothing else may be
in a manifest. Ray's launcher brings its own.
"""

import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from launch.cluster import kuberay, ray_up
from moe.config_file import load
from moe.errors import InputError

QUANTITY = {"type": "string", "pattern": r"^[0-9]+(Ki|Mi|Gi|Ti)?$"}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
COUNT = {"type": "integer", "minimum": 0}


def fields(required=(), **properties):
    """An object of these and no other fields."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def texts(pattern=""):
    return {"type": "object", "additionalProperties": {"type": "string", "pattern": pattern}}


def several(items):
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
RESOURCES = fields(["cpu", "memory"], **{"cpu": QUANTITY, "memory": QUANTITY, "nvidia.com/gpu": QUANTITY})
CONTAINER = fields(
    ["name", "image", "resources"], name=NAME, image=TEXT,
    resources=fields(["limits"], requests=RESOURCES, limits=RESOURCES),
    volumeMounts=several(fields(["name", "mountPath"], name=NAME, mountPath=TEXT, readOnly={"type": "boolean"})),
    lifecycle=fields(preStop=fields(exec=fields(command=several(TEXT)))),
)  # fmt: skip
VOLUME = fields(
    ["name"], name=NAME, persistentVolumeClaim=fields(["claimName"], claimName=TEXT),
    configMap=fields(["name"], name=NAME), emptyDir=fields(medium={"enum": ["Memory"]}, sizeLimit=QUANTITY),
)  # fmt: skip
POD = fields(["spec"], spec=fields(
    ["containers", "restartPolicy"], serviceAccountName=NAME, restartPolicy={"enum": ["Never", "Always", "OnFailure"]},
    terminationGracePeriodSeconds=COUNT, containers=several(CONTAINER), volumes=several(VOLUME), nodeSelector=texts(),
    tolerations=several(fields(key=TEXT, operator={"enum": ["Exists", "Equal"]}, effect={"enum": ["NoSchedule"]})),
))  # fmt: skip
METADATA = fields(["name"], name=NAME, namespace=NAME)
RAY_JOB = fields(
    ["apiVersion", "kind", "metadata", "spec"], apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"},
    metadata=METADATA,
    spec=fields(
        ["entrypoint", "rayClusterSpec"], entrypoint=TEXT, backoffLimit=COUNT, activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"}, ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=fields(
            ["headGroupSpec", "workerGroupSpecs"], rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
            authOptions=fields(["mode"], mode={"enum": ["disabled", "token"]}),
            headGroupSpec=fields(["template"], rayStartParams=texts(), template=POD),
            workerGroupSpecs=several(fields(
                ["groupName", "replicas", "minReplicas", "maxReplicas", "template"], groupName=NAME, replicas=COUNT,
                minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=texts(), template=POD,
            )),
        ),
    ),
)  # fmt: skip
CONFIG_MAP = fields(["apiVersion", "kind", "metadata", "data"], apiVersion={"const": "v1"}, kind={"const": "ConfigMap"},
                    metadata=METADATA, data=texts())  # fmt: skip


@pytest.fixture
def rayjob(ask):
    """A function: both objects, for overrides; `changed` are options of the manifest, the rest the request's."""

    def made(*overrides: str, changed=None, gpus_per_node=None, **more):
        request = ask(*overrides, gpus_per_node=gpus_per_node, **{"chdir": "/shared"} | more)
        text = kuberay.manifest(request, "now", **{"image": "registry/polyclinic:1", "volume": "claim:/shared"}
                                | (changed or {}))  # fmt: skip
        return list(yaml.safe_load_all(text))

    return made


def test_a_rayjob_is_of_its_schema(rayjob):
    options = {"namespace": "ml", "service_account": "trainer", "node_selector": ("gpu=h100",)}
    config_map, job = rayjob("cluster.workers=16", "cluster.min_workers=8", changed=options, time="24:00:00")
    jsonschema.validate(config_map, CONFIG_MAP)
    jsonschema.validate(job, RAY_JOB)
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 2, 2)
    assert job["spec"]["activeDeadlineSeconds"] == 86400
    group["template"]["spec"]["restartPolicies"] = "Never"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAY_JOB)


def test_only_workers_have_gpus(rayjob):
    cluster = rayjob("cluster.workers=16")[1]["spec"]["rayClusterSpec"]
    head, worker = (each["template"]["spec"] for each in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]))
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    for pod in (head, worker):
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        assert "/dev/shm" in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    without = rayjob(gpus_per_node=0)[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert "nvidia.com/gpu" not in without["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "tolerations" not in without["template"]["spec"]


def test_the_config_is_in_it_word_for_word(rayjob, ask, tmp_path):
    config_map, job = rayjob("train.steps=7")
    (tmp_path / "again.yaml").write_text(config_map["data"]["config.yaml"])
    assert load(tmp_path / "again.yaml") == ask("train.steps=7").config
    assert job["spec"]["entrypoint"] == "bash /etc/polyclinic/train.sh"
    assert job["metadata"] == config_map["metadata"]


def test_the_script_is_sound(rayjob, ask, shellcheck):
    assert shellcheck(rayjob()[0]["data"]["train.sh"]) == ""
    assert shellcheck(ray_up.script(ask(chdir="/a folder", setup=("module load cuda",)))) == ""
    assert shellcheck(kuberay.LEAVE.format(grace=120)) == ""


@pytest.mark.parametrize(
    "run, want",
    [
        pytest.param("mixture-64gpu", "mixture-64gpu", id="as-it-is"),
        pytest.param("Mixture_64.GPU", "mixture-64-gpu-", id="changed"),
        pytest.param("64gpu", "run-64gpu-", id="begins-with-a-digit"),
        pytest.param("m" * 60, "m" * 40 + "-", id="long"),
    ],
)
def test_names_are_those_of_kubernetes(run, want):
    name = kuberay.object_name(run)
    jsonschema.validate(name, NAME)
    assert name.startswith(want)
    assert kuberay.object_name(run + "x") != name and kuberay.object_name(run.upper() + "_") != name


@pytest.mark.parametrize(
    "overrides, changed, part",
    [
        pytest.param([], {"image": None}, "--image is missing", id="no-image"),
        pytest.param([], {"volume": None}, "--volume is missing: want CLAIM:/PATH", id="no-volume"),
        pytest.param([], {"volume": "claim"}, "--volume=claim: want CLAIM:/PATH", id="no-path"),
        pytest.param(["run.folder=/home/me"], {}, "run.folder=/home/me: want it under /shared", id="elsewhere"),
        pytest.param(["run.folder=../home"], {}, "want it under /shared", id="outside"),
        pytest.param([], {"node_selector": ("h100",)}, "--node-selector=h100", id="selector"),
    ],
)
def test_what_a_rayjob_lacks_is_refused(rayjob, overrides, changed, part):
    with pytest.raises(InputError, match=part):
        rayjob(*overrides, changed=changed)


# --- the script on the head


@pytest.fixture
def head(rayjob, slurm, tmp_path):
    """A function: run the script in tmp_path as the head would, with stand-ins; its end."""
    slurm.put("python", "exit 0\n")
    config_map, _ = rayjob("run.folder=runs", chdir=str(tmp_path), changed={"volume": f"claim:{tmp_path}"})
    script = config_map["data"]["train.sh"]

    def run():
        environment = {"PATH": f"{slurm.commands}:/usr/bin:/bin"}
        return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30)

    return run


def test_what_has_failed_for_good_is_not_tried_again(head, slurm, tmp_path):
    slurm.put("polyclinic", f"echo once >>{tmp_path}/calls; exit 2\n")
    assert head().returncode == 2
    again = head()
    assert again.returncode == 1 and "failed for good: exit status 2" in again.stderr
    assert (tmp_path / "calls").read_text() == "once\n"


def test_what_was_stopped_goes_on(head, slurm, tmp_path):
    slurm.put("polyclinic", 'echo "$*"; exit 75\n')
    first = head()
    assert first.returncode == 75 and "--resume" not in first.stdout
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/config.yaml").touch()
    assert head().stdout == "train /etc/polyclinic/config.yaml cluster.address=auto --resume\n"


# --- Ray's launcher


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"hosts": ("10.0.0.1", "10.0.0.2"), "ssh_user": "me", "ssh_private_key": "~/.ssh/id"}, id="hosts"),
        pytest.param({"instance_type": "p5.48xlarge", "region": "us-east-1", "image": "polyclinic:1"}, id="aws"),
    ],
)
def test_a_cluster_file_is_one_that_rays_launcher_takes(ask, options):
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = ray_up.manifest(ask("cluster.workers=16", chdir="/shared"), **options)
    cluster = yaml.safe_load(text)
    validate_config(prepare_config(cluster))
    starts = [command for command in (*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"])
              if "ray start" in command]  # fmt: skip
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(cluster | {"head_starts": []}))


def test_hosts_are_as_many_as_nodes_and_the_first_works_too(ask):
    cluster = yaml.safe_load(ray_up.manifest(ask("cluster.workers=16", chdir="/shared"), hosts=("a", "b")))
    assert cluster["provider"] == {"type": "local", "head_ip": "a", "worker_ips": ["b"]}
    assert "--num-gpus=8" in cluster["head_start_ray_commands"][-1]


def test_machines_of_aws_are_started_all_at_once_beside_a_head(ask):
    options = {"instance_type": "p5.48xlarge", "region": "us-east-1"}
    cluster = yaml.safe_load(ray_up.manifest(ask("cluster.workers=16", chdir="/shared"), **options))
    worker = cluster["available_node_types"]["worker"]
    assert worker["min_workers"] == worker["max_workers"] == cluster["max_workers"] == 2
    assert "--num-gpus=0" in cluster["head_start_ray_commands"][-1]


@pytest.mark.parametrize(
    "options, chdir, part",
    [
        pytest.param({}, "/shared", "want one of them", id="no-machines"),
        pytest.param({"hosts": ("a",)}, "/shared", "given 1 times: want 2 hosts", id="too-few"),
        pytest.param({"instance_type": "p5.48xlarge"}, "/shared", "want --region", id="no-region"),
        pytest.param({"hosts": ("a", "b")}, "", "--chdir=: want a folder on storage", id="no-storage"),
    ],
)
def test_what_rays_launcher_lacks_is_refused(ask, options, chdir, part):
    with pytest.raises(InputError, match=part):
        ray_up.manifest(ask("cluster.workers=16", chdir=chdir), **options)


def test_what_is_run_lies_beside_the_code():
    folder = Path(kuberay.__file__).parent
    assert {path.name for path in folder.glob("*.sh")} == {"job.sh", "ray.sh", "torchrun.sh", "train.sh"}
