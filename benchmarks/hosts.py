"""Several hosts on one machine: network namespaces joined by a bridge, each with a link of a given rate.

Processes in different namespaces see different hosts that share the file system and the cores. Needs Linux, iproute2
and root (CAP_NET_ADMIN and CAP_SYS_ADMIN).
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

INTERFACE = "eth0"
QUEUE = ("burst", "256kb", "latency", "200ms")  # of a link with a rate


class NoHosts(RuntimeError):
    """Why there can be none here."""


@dataclass(frozen=True)
class Host:
    name: str  # of its namespace
    address: str
    link: str  # its end on the bridge

    def command(self, argv: Sequence[str]) -> list[str]:
        """The same command, run on this host."""
        return ["ip", "netns", "exec", self.name, *argv]

    def cut(self) -> None:
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        _ip("link", "set", self.link, "up")


@contextlib.contextmanager
def hosts(count: int, rate: str | None = None) -> Iterator[list[Host]]:
    """So many hosts 10.77.0.1, 10.77.0.2, ...; `rate` of what each sends as `tc` writes it, such as 1gbit.

    All are gone afterwards. Raises NoHosts where this machine does not allow them."""
    own = f"pc{os.getpid() % 10000:04}"  # interface names have at most 15 letters
    made = [Host(f"{own}h{n}", f"10.77.0.{n}", f"{own}v{n}") for n in range(1, count + 1)]
    with contextlib.ExitStack() as undo:
        try:
            _ip("link", "add", own, "type", "bridge")
            undo.callback(_ip, "link", "del", own)
            _ip("link", "set", own, "up")
            for host in made:
                _ip("netns", "add", host.name)
                undo.callback(_ip, "netns", "del", host.name)  # and with it both ends of its link
                _ip("link", "add", host.link, "type", "veth", "peer", "name", INTERFACE, "netns", host.name)
                _ip("link", "set", host.link, "master", own, "up")
                _ip("-n", host.name, "link", "set", "lo", "up")
                _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
                _ip("-n", host.name, "link", "set", INTERFACE, "up")
                if rate:
                    _run(host.command(["tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", "rate", rate, *QUEUE]))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            raise NoHosts(f"no hosts on this machine: {reason.strip()}") from error
        yield made


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(argv: list[str]) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True)
