"""What is installed: torch and what has to match it, packages that take our names, the corpus, keys of services."""

import importlib.util
import netrc
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from launch.preflight.finding import Finding
from launch.preflight.nvidia import ABSENT, Seen
from moe.config import PUBLIC, JobConfig, RunConfig
from moe.data import sources
from moe.data.demonstration import packages
from moe.data.prepare import domains
from moe.errors import InputError

OURS = ("kernels", "moe", "launch")
DISTRIBUTION = "polyclinic"
TRITON = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8"}  # of a torch; its CUDA builds name it themselves
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # of its own servers, by its older and newer packages


def versions() -> dict[str, str | None]:
    """Of what has to be the same on all nodes."""
    names = (DISTRIBUTION, "torch", "triton", "deepspeed", "ray")
    return {"python": platform.python_version()} | {name: packages.installed_version(name) for name in names}


def installed(found: Mapping[str, str | None]) -> Finding:
    what = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    if None in found.values():
        return Finding("versions", "wrong", what, "make install, or pip install . with constraints.txt")
    return Finding("versions", "ok", what)


def triton(torch: str | None, found: str | None, requirements: Sequence[str]) -> Finding:
    """`requirements` are torch's own."""
    if torch is None or found is None:
        return Finding("torch and triton", "wrong", f"torch {torch or 'missing'}, triton {found or 'missing'}",
                       "make install, or pip install . with constraints.txt")
    pinned = [match[1] for line in requirements if (match := re.match(r"triton\s*\(?==\s*([\d.]+)", line))]
    wanted = pinned[0] if pinned else TRITON.get(".".join(torch.split(".")[:2]))
    what = f"torch {torch}, triton {found}"
    if wanted is None:
        return Finding("torch and triton", "warning", f"{what}: a pair that we have not seen",
                       f"torch {min(TRITON)} to {max(TRITON)}, with which our tests pass")
    if found.split(".")[: wanted.count(".") + 1] != wanted.split("."):
        return Finding("torch and triton", "wrong", f"{what}: this torch wants triton {wanted}",
                       f"pip install 'triton=={wanted}{'' if wanted.count('.') > 1 else '.*'}'")
    return Finding("torch and triton", "ok", what)


def cuda(seen: Seen) -> Finding:
    """Whether torch can use the driver. Imports torch where there is a GPU."""
    if not seen.gpus:
        return Finding("CUDA", "skipped", ABSENT)
    import torch

    return match(seen.cuda, torch.version.cuda, torch.cuda.is_available())


def match(driver: tuple[int, int] | None, torch: str | None, usable: bool) -> Finding:
    """`driver` is the newest CUDA that it knows, `torch` the one that it was built with, as in 13.0."""
    knows = ".".join(map(str, driver)) if driver else "an unknown CUDA"
    if torch is None:
        return Finding("CUDA", "wrong", "torch is a CPU build on a machine with GPUs",
                       "pip uninstall torch, then make install, which takes the CUDA build where there is a driver")
    built = tuple(int(part) for part in torch.split(".")[:2])
    what = f"torch is built for CUDA {torch}, the driver knows {knows}"
    if driver and built[0] > driver[0]:
        return Finding("CUDA", "wrong", what, f"install a newer driver, or a torch built for CUDA {driver[0]}")
    if not usable:
        return Finding("CUDA", "wrong", f"{what}, and torch cannot use it",
                       "python -c 'import torch; torch.zeros(1).cuda()' says why; often the driver was updated and the "
                       "machine not restarted, or CUDA_VISIBLE_DEVICES is empty")  # fmt: skip
    if driver and built > driver:
        return Finding("CUDA", "warning", f"{what}: it works, but nothing can be compiled for it at run time",
                       "install a newer driver")
    return Finding("CUDA", "ok", what)


def nccl(seen: Seen) -> Finding:
    if not seen.gpus:
        return Finding("NCCL", "skipped", ABSENT)
    import torch

    if not torch.distributed.is_nccl_available():
        return Finding("NCCL", "wrong", "this torch has none", "install a CUDA build of torch: make install")
    return Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def names(providers: Mapping[str, Sequence[str]] | None = None) -> Finding:
    """Whether other distributions bring packages of our names. `providers`: distributions of each; None: look."""
    providers = metadata.packages_distributions() if providers is None else providers
    others = {name: sorted({each for each in providers.get(name, ()) if each.lower() != DISTRIBUTION}) for name in OURS}
    if clashes := {name: each for name, each in others.items() if each}:
        whose = sorted(set().union(*clashes.values()))
        what = f"{', '.join(clashes)} also from {', '.join(whose)}: one hides the other"
        return Finding("package names", "wrong", what,
                       f"pip uninstall {' '.join(whose)}, then install polyclinic again")
    places = {name: _place(name) for name in OURS}
    if len(set(places.values())) > 1:
        what = ", ".join(f"{name} from {place}" for name, place in places.items())
        return Finding("package names", "wrong", f"not ours all: {what}",
                       "take the wrong one off PYTHONPATH, or start from another folder")
    return Finding("package names", "ok", f"{', '.join(OURS)} are ours alone")


def _place(name: str) -> Path | None:
    """Folder that a package is imported from."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parents[1] if spec and spec.origin else None


def corpus(config: RunConfig | None) -> list[Finding]:
    """Whether the text that a config names is there; without one, whether that of the demonstration is."""
    if config is None:
        return [_demonstration(specialty) for specialty in packages.NEEDS]
    found = []
    for name, data in domains(config).items():
        if data.demonstration:
            found.append(_demonstration(data.demonstration, "wrong"))
            continue
        try:
            sources.check(name, data)
        except InputError as error:
            found.append(Finding(f"text of {name}", "wrong", str(error), f"mend {_key(config, name)}"))
        else:
            files = len((*data.documents, *data.held_out))
            what = f"{files} files, whose licence you know" if files else "words drawn by chance"
            found.append(Finding(f"text of {name}", "ok", what))
    return found


def _key(config: RunConfig, domain: str) -> str:
    """Of a config, that says where a domain's text is."""
    if isinstance(config, JobConfig):
        return f"domains.{domain}"
    return PUBLIC if domain == PUBLIC else f"owners.{domain}.data"


def _demonstration(specialty: str, state: str = "warning") -> Finding:
    name = f"corpus of {specialty}"
    try:
        packages.check(specialty)
    except InputError as error:
        what, _, mend = str(error).partition("; ")
        return Finding(name, state, what, mend or "install the extra: pip install 'polyclinic[data]'")
    whose = (f"{package} ({packages.LICENCES[package]})" for package in packages.NEEDS[specialty])
    return Finding(name, "ok", "; ".join(whose))


def wandb(config: RunConfig | None, environment: Mapping[str, str] | None = None, home: Path | None = None) -> Finding:
    """Whether there is a key, where one is wanted. It is not looked at."""
    if config is None or config.tracking.wandb != "online":
        return Finding("W&B", "skipped", "tracking.wandb is not online: no key is needed")
    environment = os.environ if environment is None else environment
    if environment.get("WANDB_API_KEY"):
        return Finding("W&B", "ok", "WANDB_API_KEY is set")
    own = urlsplit(environment.get("WANDB_BASE_URL", "")).hostname
    path = Path(environment.get("NETRC") or (home or Path.home()) / ".netrc")
    try:
        entries = netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        entries = {}
    hosts = (own,) if own else WANDB_HOSTS
    if known := next((host for host in hosts if host in entries), None):
        return Finding("W&B", "ok", f"{path.name} has a key for {known}")
    return Finding("W&B", "wrong", f"tracking.wandb=online, and there is no key for {' or '.join(hosts)}",
                   "wandb login, or set WANDB_API_KEY, or tracking.wandb=offline")
