"""Room on the cluster: what its nodes hold now, and what the jobs of this run have taken of it.

Nodes come and go. A job waits until there is room for all of its workers, of as many as it can use; how long it waits
where the cluster itself has become too small is for the job to say.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

POLL_SECONDS = 0.5
CONNECT_SECONDS = 2.0

Label = tuple[str, str]  # of a node: (key, value)


@dataclass(frozen=True)
class Node:
    id: str
    host: str
    slots: int  # workers that fit on it, were it empty
    labels: frozenset[Label] = frozenset()


Look = Callable[..., Sequence[Node]]  # as `nodes`, for one kind of slot


def nodes(use_gpu: bool, sure: bool = False) -> list[Node]:
    """The cluster's nodes that are alive and will stay so, as far as Ray knows; which learns of a death only after some
    time: where it must be `sure`, those that do not listen are left out."""
    leaving = ray._private.state.state.get_draining_nodes()  # there is no public name for it
    found = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leaving and (not sure or _listens(node)):
            resources = node["Resources"]
            slots = min(resources.get(kind, 0) for kind in (("GPU", "CPU") if use_gpu else ("CPU",)))
            labels = frozenset((node.get("Labels") or {}).items())
            found.append(Node(node["NodeID"], node["NodeManagerHostname"], int(slots), labels))
    return found


def _listens(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), CONNECT_SECONDS).close()
        return True
    except OSError:
        return False


class Room:
    """Deals out the slots of the nodes that `look` finds; look(sure=True) is the slower way."""

    def __init__(self, look: Look):
        self._look = look
        self._taken: dict[Label | None, int] = {}
        self._waiting = 0
        self._changed = threading.Condition()

    def slots(self, label: Label | None, sure: bool = False) -> int:
        """All that a job bound to the label, or to none, could have if it were alone."""
        return sum(node.slots for node in self._look(sure=sure) if label is None or label in node.labels)

    @contextlib.contextmanager
    def take(self, sizes: Sequence[int], label: Label | None, waiting: Callable[[int], None]) -> Iterator[int]:
        """Take the first of `sizes` (largest first) that there is room for. While there is room for none, call
        `waiting` with the number of slots now and then; what it raises ends the wait."""
        size = self._wait(sizes, label, waiting)
        try:
            yield size
        finally:
            with self._changed:
                self._taken[label] -= size
                self._changed.notify_all()

    def larger(self, size: int, sizes: Sequence[int], label: Label | None, sure: bool = False) -> int:
        """The largest of `sizes` that a job which holds `size` could have; `size` while another job waits."""
        with self._changed:
            free = 0 if self._waiting else self.slots(label, sure) - self._against(label)
        return next((n for n in sizes if n <= size + free), size)

    def _wait(self, sizes: Sequence[int], label: Label | None, waiting: Callable[[int], None]) -> int:
        with self._changed:
            self._waiting += 1
            try:
                while True:
                    slots = self.slots(label, sure=True)
                    if (size := next((n for n in sizes if n <= slots - self._against(label)), None)) is not None:
                        break
                    waiting(slots)
                    self._changed.wait(POLL_SECONDS)
                self._taken[label] = self._taken.get(label, 0) + size
                return size
            finally:
                self._waiting -= 1

    def _against(self, label: Label | None) -> int:
        """What others have of it. A job that is bound to no label may be anywhere: it counts against all."""
        return sum(n for other, n in self._taken.items() if label is None or other in (None, label))
