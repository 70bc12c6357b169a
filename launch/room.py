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


@dataclass(eq=False)
class Place:
    """A job's place in the line for room, which it keeps until it has `ended`. Before it is `ready` its workers can
    only wait: it takes nothing that a job before it may need, or may need again, and gives way to one that is ready."""

    most: int  # slots that it can use
    label: Label | None
    ready: bool = False
    ended: bool = False
    taken: int = 0
    waiting: bool = False


class Room:
    """Deals out the slots of the nodes that `look` finds; look(sure=True) is the slower way."""

    def __init__(self, look: Look):
        self._look = look
        self._line: list[Place] = []
        self._changed = threading.Condition()

    def place(self, most: int, label: Label | None) -> Place:
        """For a job that can use so many slots, behind all others. None waits for what one behind it is to make."""
        with self._changed:
            self._line.append(Place(most, label))
            return self._line[-1]

    def ready(self, place: Place) -> None:
        """What the job needs is there."""
        with self._changed:
            place.ready = True
            self._changed.notify_all()

    def end(self, place: Place) -> None:
        """The job needs no room any more."""
        with self._changed:
            place.ended = True
            self._changed.notify_all()

    def slots(self, label: Label | None, sure: bool = False) -> int:
        """All that a job bound to the label, or to none, could have if it were alone."""
        return sum(node.slots for node in self._look(sure=sure) if label is None or label in node.labels)

    @contextlib.contextmanager
    def take(self, place: Place, sizes: Sequence[int], waiting: Callable[[int], None]) -> Iterator[int]:
        """Take the first of `sizes` (largest first) that there is room for. While there is room for none, call
        `waiting` with the number of slots now and then; what it raises ends the wait."""
        size = self._wait(place, sizes, waiting)
        try:
            yield size
        finally:
            with self._changed:
                place.taken = 0
                self._changed.notify_all()

    def larger(self, place: Place, sizes: Sequence[int], sure: bool = False) -> int:
        """The largest of `sizes` that a job could have in place of what it has taken; the same while another waits."""
        with self._changed:
            free = 0 if self._ready_waits(place) else self.slots(place.label, sure) - self._against(place)
        return next((n for n in sizes if n <= max(free, place.taken)), place.taken)

    def wanted(self, place: Place) -> bool:
        """Whether a job that is not ready is to give back what it has: one that is ready waits for room."""
        with self._changed:
            return not place.ready and self._ready_waits(place)

    def _wait(self, place: Place, sizes: Sequence[int], waiting: Callable[[int], None]) -> int:
        with self._changed:
            place.waiting = True
            try:
                while True:
                    slots = self.slots(place.label, sure=True)
                    if (size := next((n for n in sizes if n <= slots - self._against(place)), None)) is not None:
                        break
                    waiting(slots)
                    self._changed.wait(POLL_SECONDS)
                place.taken = size
                return size
            finally:
                place.waiting = False

    def _against(self, place: Place) -> int:
        """What others have of it, or are to have before it."""
        before, found = True, 0
        for other in self._line:
            if other is place:
                before = False
            elif _share(place, other):
                first = not place.ready and not other.ended and (before or (other.ready and other.waiting))
                found += max(other.taken, other.most * first)
        return found

    def _ready_waits(self, place: Place) -> bool:
        return any(other.ready and other.waiting and _share(place, other) for other in self._line if other is not place)


def _share(one: Place, other: Place) -> bool:
    """Whether a slot could go to either. A job that is bound to no label may be anywhere."""
    return one.label is None or other.label in (None, one.label)
