"""The machine around the GPUs: disk, shared memory, limits, ports, its name, its clock, a compiler."""

import contextlib
import os
import resource
import shutil
import socket
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from launch.preflight.finding import Finding
from moe.config import RunConfig

PORTS = {6379: "Ray", 8265: "Ray's dashboard", 29500: "torchrun"}  # where nothing else is said
PROBE_BYTES, PROBE_SECONDS = 128 * 2**20, 2.0
SLOW_MB_PER_S = 100.0
SHARED_MEMORY = 2**30  # NCCL and Ray's object store; docker gives 64 MiB
FILES, FEWEST_FILES = 65536, 4096  # of one process: Ray and NCCL keep many connections
SINCE = 1767225600.0  # 2026: no machine that runs this is older


def compiler(needed: bool) -> Finding:
    """`needed`: Triton compiles its launchers."""
    program = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    bad = "wrong" if needed else "warning"
    if not program or not shutil.which(program):
        return Finding("C compiler", bad, f"{program or 'cc, gcc, clang'} not found: Triton needs one",
                       "install gcc, or set CC")
    if not header.exists():
        return Finding("C compiler", bad, f"{program}, but {header} is missing: Triton needs it",
                       "install Python's headers (python3-dev)")
    return Finding("C compiler", "ok", program)


def disk(folder: Path, needed: float | None, checkpoints: int) -> list[Finding]:
    """Space and speed where a run's folder is to be; `needed` bytes are its checkpoints', so many of them at once."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(place).free
        speed = write_speed(place)
    except OSError as error:
        return [Finding("disk space", "wrong", f"{place} cannot be written: {error.strerror}",
                        "choose another run.folder, or have it opened to you")]  # fmt: skip
    return [space(place, free, needed, checkpoints), pace(place, speed, needed / checkpoints if needed else None)]


def space(place: Path, free: float, needed: float | None, checkpoints: int) -> Finding:
    if needed is None:
        return Finding("disk space", "ok", f"{place} has {_size(free)}; with a config we say what it needs")
    what = f"needs about {_size(needed)} for {checkpoints} checkpoints, {place} has {_size(free)}"
    if free < needed:
        return Finding("disk space", "wrong", what, "make room, or choose another run.folder")
    if free < 2 * needed:
        return Finding("disk space", "warning", what, "make room: text and model come on top")
    return Finding("disk space", "ok", what)


def pace(place: Path, mb_per_s: float, checkpoint: float | None) -> Finding:
    each = f": {_duration(checkpoint / mb_per_s / 1e6)} for a checkpoint from this node alone" if checkpoint else ""
    what = f"{place} takes {mb_per_s:,.0f} MB/s{each}"
    if mb_per_s < SLOW_MB_PER_S:
        return Finding("disk speed", "warning", what, "choose a faster place for run.folder, or a longer "
                                                      "checkpoint_every")  # fmt: skip
    return Finding("disk speed", "ok", what)


def write_speed(place: Path) -> float:
    """MB/s to the disk itself, of a few hundred MB at most; nothing is left behind."""
    block = os.urandom(4 * 2**20)
    with tempfile.TemporaryFile(dir=place) as file:
        began, written = time.perf_counter(), 0
        while written < PROBE_BYTES and time.perf_counter() - began < PROBE_SECONDS:
            written += file.write(block)
            os.fsync(file.fileno())
        return written / 1e6 / (time.perf_counter() - began)


def shared_memory(size: float | None = None) -> Finding:
    """`size` in bytes; None: look."""
    if size is None:
        try:
            found = os.statvfs("/dev/shm")
        except OSError:
            return Finding("shared memory", "wrong", "there is no /dev/shm", "mount a tmpfs there")
        size = found.f_blocks * found.f_frsize
    if size < SHARED_MEMORY:
        return Finding("shared memory", "wrong", f"/dev/shm has {_size(size)}: want {_size(SHARED_MEMORY)} or more",
                       "in a container, --shm-size=16g or an emptyDir of medium Memory; else remount it larger")
    return Finding("shared memory", "ok", f"/dev/shm has {_size(size)}")


def open_files(soft: int | None = None, hard: int | None = None) -> Finding:
    if soft is None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = float("inf") if soft == resource.RLIM_INFINITY else soft
    if most >= FILES:
        return Finding("open files", "ok", f"{soft if most < float('inf') else 'unlimited'} in a process")
    allowed = hard == resource.RLIM_INFINITY or hard >= FILES
    mend = f"ulimit -n {FILES}" + ("" if allowed else ", which root has to allow in /etc/security/limits.conf")
    state = "wrong" if most < FEWEST_FILES else "warning"
    return Finding("open files", state, f"{soft} in a process: want {FILES}", mend)


def locked_memory(infiniband: bool, soft: int | None = None) -> Finding:
    """Memory that the network's hardware may reach; matters with InfiniBand."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if soft is None else soft
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", "ok", "unlimited")
    if not infiniband:
        return Finding("locked memory", "ok", f"{_size(soft)}, which is enough without InfiniBand")
    return Finding("locked memory", "wrong", f"{_size(soft)}: InfiniBand wants it unlimited",
                   "ulimit -l unlimited, allowed in /etc/security/limits.conf; in a container --ulimit memlock=-1")


def ports(wanted: dict[int, str] | None = None) -> Finding:
    """Those that launchers take where nothing else is said."""
    wanted = PORTS if wanted is None else wanted
    taken = [f"{port} ({whose})" for port, whose in wanted.items() if not _free(port)]
    if taken:
        return Finding("ports", "warning", f"{', '.join(taken)} in use: a cluster or job runs here already",
                       "end it, or give another port (ray start --port, torchrun --rdzv-endpoint HOST:PORT)")
    return Finding("ports", "ok", f"{', '.join(map(str, wanted))} are free")


def _free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what has ended is no hindrance
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def hostname(addresses: Iterable[str] | None = None) -> Finding:
    """`addresses` are those that the machine's name stands for; None: look."""
    name = socket.gethostname()
    if addresses is None:
        try:
            addresses = {found[4][0] for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
        except OSError as error:
            return Finding("host name", "wrong", f"{name} cannot be looked up ({error.strerror}): ranks could not meet",
                           "put it into /etc/hosts or DNS with this machine's address, not with 127.0.0.1")
    found = sorted(addresses)
    if all(address.startswith("127.") or address == "::1" for address in found):
        return Finding("host name", "warning", f"{name} stands for {', '.join(found)}: other nodes cannot come to that",
                       "on a cluster, put the machine's own address into /etc/hosts or DNS")
    return Finding("host name", "ok", f"{name} stands for {', '.join(found)}")


def clock(now: float | None = None) -> Finding:
    now = time.time() if now is None else now
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < SINCE:
        return Finding("clock", "wrong", f"it says {said}", "set it, best by NTP (chrony, systemd-timesyncd)")
    return Finding("clock", "ok", said)


def run_folder(config: RunConfig | None) -> Path:
    """Where a run's files go; without a config, where configs would put them."""
    return config.run.path if config else Path("runs")


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
