"""Wait until the nodes that a run counts on have joined its Ray cluster:

    python -m launch.cluster.ready ADDRESS --nodes 8 --workers 8 [--seconds 300] [--gpu]

ADDRESS is HOST:PORT of the cluster's head, or auto on one of its nodes. Exit status 0 also where some have not come in
time, which it says: the run knows with how few it can go on. 1 where no cluster answers.
"""

import argparse
import sys
import time
from collections.abc import Callable

POLL_SECONDS = 1.0
SECONDS_BETWEEN_LINES = 15.0
SECONDS = 300.0


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    options = _parser().parse_args(arguments)
    import ray

    try:
        ray.init(address=options.address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        _say(f"no Ray cluster answers at {options.address}: {reason}")
        return 1
    try:
        from launch.room import nodes  # which imports ray

        wait(lambda: sum(node.slots >= options.workers for node in nodes(options.gpu)), options.nodes, options.seconds)
    finally:
        ray.shutdown()
    return 0


def wait(come: Callable[[], int], wanted: int, limit: float) -> bool:
    """Until `come`, the number of nodes that are there, is `wanted`; at most `limit` seconds. Whether they are."""
    began = said = time.monotonic()
    while (there := come()) < wanted:
        now = time.monotonic()
        if now - began >= limit:
            _say(f"{there} of {wanted} nodes have come within {limit:g} s; going on with those")
            return False
        if now - said >= SECONDS_BETWEEN_LINES:
            said = now
            _say(f"{there} of {wanted} nodes have come; waiting up to {limit - (now - began):.0f} s for the others")
        time.sleep(POLL_SECONDS)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.cluster.ready", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT of the cluster's head, or auto on one of its nodes")
    parser.add_argument("--nodes", type=int, required=True, help="how many to wait for")
    parser.add_argument("--workers", type=int, required=True, help="for which each of them has room")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long to wait")
    parser.add_argument("--gpu", action="store_true", help="each worker takes a GPU")
    return parser


def _say(sentence: str) -> None:
    print(f"polyclinic: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
