"""Questions answered by several processes, in the order in which they are asked.

    in_order(questions, make, workers)      `make` gives each process a function of its own, which answers

Each process is at the other end of a pipe of its own, so that the end of one that is killed is seen, whatever it was
doing then. In a pool that shares one queue the others would wait for ever for the rest of what it had begun to say. The
processes end with the first one, however that ends.
"""

import collections
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any

AHEAD = 3  # questions for each process that are asked and not yet given the answer of
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that tell a process to end
PRELOADED = ("moe.data.curation.rows", "presidio_analyzer", "presidio_anonymizer", "datasketch")  # once, for all


class WorkerLost(RuntimeError):
    """A process is gone before it has answered."""


def in_order(questions: Iterable[Any], make: Callable[[], Callable[[Any], Any]], workers: int) -> Iterator[Any]:
    """To be closed, if not gone through: that ends the processes. Raises WorkerLost, and what `make` or its function
    raises."""
    # Not fork: a process that has threads may not.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    _start_server()
    crew: list[_Worker] = []
    idle: collections.deque[_Worker] = collections.deque()
    answers: dict[int, Any] = {}
    asked = given = 0
    try:
        for question in questions:
            if not idle and len(crew) < workers:
                with _signals_wait():
                    crew.append(_Worker(context, make))
                idle.append(crew[-1])
            while not idle or asked - given >= AHEAD * workers:
                idle.extend(_hear(crew, answers))
                while given in answers:
                    yield answers.pop(given)
                    given += 1
            idle.popleft().ask(asked, question)
            asked += 1
        while given < asked:
            while given not in answers:
                _hear(crew, answers)
            yield answers.pop(given)
            given += 1
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    def __init__(self, context: Any, make: Callable[[], Callable[[Any], Any]]):
        self.pipe, theirs = context.Pipe()
        self.number: int | None = None  # of the question that it is asked
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with _missed():
            self._process.start()
        theirs.close()

    def ask(self, number: int, question: Any) -> None:
        with _missed():
            self.pipe.send(question)
        self.number = number

    def end(self) -> None:
        self.pipe.close()
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()


def _hear(crew: list[_Worker], answers: dict[int, Any]) -> list[_Worker]:
    """Wait for an answer; who has given one."""
    asked = {worker.pipe: worker for worker in crew if worker.number is not None}
    heard = [asked[pipe] for pipe in connection.wait(list(asked))]
    for worker in heard:
        with _missed():
            answer, error = worker.pipe.recv()
        if error is not None:
            raise error
        answers[worker.number], worker.number = answer, None
    return heard


@contextlib.contextmanager
def _missed() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise WorkerLost("a process that looked at rows was ended by the machine, which may have too little memory for "
                         "as many: want fewer workers") from None


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """One that comes meanwhile comes behind: amid the start of a process it would leave one that nobody knows of, and
    that tells at length that nobody has told it what to do."""
    if threading.current_thread() is not threading.main_thread():  # which no signal interrupts
        yield
        return
    came: list[int] = []
    before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _serve(pipe: connection.Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """What a process does until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function = None
    with contextlib.suppress(EOFError, OSError):  # the first process has ended
        while True:
            question = pipe.recv()
            try:
                function = function or make()
                answer = function(question), None
            except Exception as error:
                answer = None, error
            pipe.send(answer)


def _start_server() -> None:
    """Ctrl-C goes to all processes of a terminal, and one that still imports would tell of it at length: the server of
    processes, and so each of them, begins with the signal blocked."""
    resource_tracker.ensure_running()  # which would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
