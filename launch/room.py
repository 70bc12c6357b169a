"""Room on the cluster: what its nodes hold now, what the jobs of this run have taken of it, and on which nodes.

Nodes come and go. A job waits until there is room for all of its workers, of as many as it can use; how long it waits
where the cluster itself has become too small is for the job to say. Each worker is given a node: Ray, which would pack
them anywhere, knows nothing of workers that have to share one.
"""

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray

from launch.demand import Demand, Label

POLL_SECONDS = 0.5
CONNECT_SECONDS = 2.0
ASKED_AT_ONCE = 32  # nodes, of those that may not answer


@dataclass(frozen=True)
class Node:
    id: str
    host: str
    slots: int  # workers that fit on it, were it empty
    labels: frozenset[Label] = frozenset()
    held: int = 0  # of those slots, by anybody: as far as Ray knows, which is a moment behind


Look = Callable[..., Sequence[Node]]  # as `nodes`, for one kind of slot
Placement = tuple[str, ...]  # each worker's node, by its id; those of one node stand together


def nodes(use_gpu: bool, sure: bool = False) -> list[Node]:
    """The cluster's nodes that are alive and will stay so, as far as Ray knows; which learns of a death only after some
    time: where it must be `sure`, those that do not listen are left out."""
    leaving = ray._private.state.state.get_draining_nodes()  # there are no public names for these two
    free = ray._private.state.available_resources_per_node()
    here = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    if sure and here:
        with ThreadPoolExecutor(min(len(here), ASKED_AT_ONCE)) as pool:
            here = [node for node, listens in zip(here, pool.map(_listens, here), strict=True) if listens]
    found = []
    for node in here:
        slots = _slots(node["Resources"], use_gpu)
        held = slots - min(slots, _slots(free.get(node["NodeID"], node["Resources"]), use_gpu))
        labels = frozenset((node.get("Labels") or {}).items())
        found.append(Node(node["NodeID"], node["NodeManagerHostname"], slots, labels, held))
    return found


def most(nodes: Sequence[Node], demand: Demand) -> int:
    """Workers of a job that the nodes could hold, were they empty."""
    return sum(_whole(node.slots, demand.group) for node in _labelled(nodes, demand))


def _slots(resources: dict[str, float], use_gpu: bool) -> int:
    return int(min(resources.get(kind, 0) for kind in (("GPU", "CPU") if use_gpu else ("CPU",))))


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

    demand: Demand
    ready_since: float | None = None  # by the monotonic clock
    ended: bool = False
    taken: Placement = ()
    waiting: bool = False
    avoided: set[str] = field(default_factory=set)  # nodes where it fails; used where the others are too small for it

    @property
    def ready(self) -> bool:
        return self.ready_since is not None


class Room:
    """Deals out the slots of the nodes that `look` finds; look(sure=True) is the slower way, for which nobody is made
    to wait who only wants to say something."""

    def __init__(self, look: Look):
        self._look = look
        self._line: list[Place] = []
        self._changed = threading.Condition()

    def place(self, demand: Demand) -> Place:
        """For a job, behind all others. None waits for what one behind it is to make."""
        with self._changed:
            self._line.append(Place(demand))
            return self._line[-1]

    def ready(self, place: Place) -> None:
        """What the job needs is there."""
        with self._changed:
            place.ready_since = time.monotonic()
            self._changed.notify_all()

    def end(self, place: Place) -> None:
        """The job needs no room any more."""
        with self._changed:
            place.ended = True
            self._changed.notify_all()

    def avoid(self, place: Place, node: str) -> bool:
        """Leave a node out, if the others are large enough for the job; whether they are."""
        avoided = place.avoided | {node}
        others = [each for each in self._look(sure=True) if each.id not in avoided]
        if most(others, place.demand) < place.demand.least:
            return False
        with self._changed:
            place.avoided = avoided
        return True

    @contextlib.contextmanager
    def take(self, place: Place, sizes: Sequence[int], waiting: Callable[[int], None]) -> Iterator[Placement]:
        """Take the first of `sizes` (largest first) that there is room for. While there is room for none, call
        `waiting` now and then with the number of workers that the job could have if it were alone; what that raises
        ends the wait."""
        placement = self._wait(place, sizes, waiting)
        try:
            yield placement
        finally:
            with self._changed:
                place.taken = ()
                self._changed.notify_all()

    def larger(self, place: Place, sure: bool = False) -> int:
        """The largest size that a job could have in place of what it has taken, of what nobody else holds; the same
        while another waits."""
        now, found = len(place.taken), self._look(sure=sure)
        with self._changed:
            if self._ready_waits(place):
                return now
            free = self._free(place, found)
        return next((size for size in place.demand.sizes if size > now and _placed(size, free, place)), now)

    def wanted(self, place: Place) -> bool:
        """Whether a job that is not ready is to give back what it has: one that is ready waits for room."""
        with self._changed:
            return not place.ready and self._ready_waits(place)

    def _wait(self, place: Place, sizes: Sequence[int], waiting: Callable[[int], None]) -> Placement:
        place.waiting = True
        try:
            while True:
                found = self._look(sure=True)
                with self._changed:
                    left, free = self._left(place, found), self._free(place, found)
                    # What Ray takes for held may be given back just now, by a worker of our own that has ended.
                    placed = (_placed(size, slots, place) for size in sizes for slots in (free, left))
                    if taken := next(filter(None, placed), None):
                        place.taken = taken
                        return taken
                waiting(most(found, place.demand))
                with self._changed:
                    self._changed.wait(POLL_SECONDS)
        finally:
            place.waiting = False

    def _left(self, place: Place, found: Sequence[Node]) -> dict[str, int]:
        """Slots of each node that the job may use: not what others of this run have, or are to have before it."""
        left = Counter({node.id: node.slots for node in found})
        others = [other for other in self._line if other is not place]
        for other in others:
            left.subtract(other.taken)
        if not place.ready:
            before = self._line[: self._line.index(place)]
            for other in others:
                if not other.ended and (other in before or (other.ready and other.waiting)):
                    slots = {node.id: left[node.id] for node in _labelled(found, other.demand)}
                    left.subtract(_packed(other.demand.sizes[0] - len(other.taken), slots, other.demand.group))
        usable = _labelled(found, place.demand)
        kept = [node for node in usable if node.id not in place.avoided]
        return {node.id: left[node.id] for node in (kept if most(kept, place.demand) >= place.demand.least else usable)}

    def _free(self, place: Place, found: Sequence[Node]) -> dict[str, int]:
        """Of those, the slots that Ray takes for free or held by this job."""
        left, own = self._left(place, found), Counter(place.taken)
        return {node.id: min(left[node.id], node.slots - node.held + own[node.id]) for node in found if node.id in left}

    def _ready_waits(self, place: Place) -> bool:
        return any(other.ready and other.waiting and _share(place, other) for other in self._line if other is not place)


def _placed(size: int, slots: dict[str, int], place: Place) -> Placement:
    """A node for each of so many workers; empty where they do not fit."""
    packed = _packed(size, slots, place.demand.group)
    return packed if len(packed) == size else ()


def _packed(size: int, slots: dict[str, int], group: int) -> Placement:
    """Up to `size` workers on as few nodes as hold them: the largest nodes, and the smallest that holds the rest. Each
    node's are a multiple of `group`."""
    packed: Placement = ()
    left = {node: _whole(count, group) for node, count in slots.items() if count >= group}
    while (rest := _whole(size - len(packed), group)) and left:
        enough = [node for node in left if left[node] >= rest]
        node = min(enough, key=lambda each: (left[each], each)) if enough else max(left, key=lambda each: left[each])
        packed += (node,) * min(rest, left.pop(node))
    return packed


def _whole(slots: int, group: int) -> int:
    return max(0, slots) // group * group


def _labelled(nodes: Sequence[Node], demand: Demand) -> list[Node]:
    return [node for node in nodes if demand.label is None or demand.label in node.labels]


def _share(one: Place, other: Place) -> bool:
    """Whether a slot could go to either. A job that is bound to no label may be anywhere."""
    label = one.demand.label
    return label is None or other.demand.label in (None, label)
