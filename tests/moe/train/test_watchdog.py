"""The watchdog: a rank that makes no progress says where it stands, and ends; one that does is left alone."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe.train.watchdog import RECORD_BYTES, diagnose, grace_seconds, read_rank

ROOT = Path(__file__).parents[3]


def rank_process(folder, body, rank=0):
    """A process whose watchdog allows it half a second, and which does `body` in a thread that is not the main
    one, as under Ray."""
    code = """
        import sys, threading, time
        from pathlib import Path
        from moe.train import watchdog
        watchdog.START_SECONDS, watchdog.GRACE_SECONDS = 60, 0.4

        def stuck():
            time.sleep(60)

        def work():
            with watchdog.Watchdog(Path(sys.argv[1]), int(sys.argv[2]), 2, 0.5) as dog:
                BODY

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        print("done")
    """
    indent = " " * 16
    code = textwrap.dedent(code.replace("BODY", textwrap.indent(textwrap.dedent(body).strip(), indent).strip()))
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), str(rank)], cwd=ROOT, capture_output=True, text=True, timeout=20
    )


def test_a_rank_that_hangs_writes_its_stack_and_ends(tmp_path):
    end = rank_process(tmp_path, """
        dog.beat("micro-batch 3", 7)
        dog.beat("micro-batch 0", 8)
        stuck()
    """)  # fmt: skip
    assert end.returncode == -signal.SIGALRM and end.stdout == ""
    said = diagnose(tmp_path, 1)
    assert said.startswith("rank 0 on ") and " hung in micro-batch 0, 8 updates done, at <string>:8 stuck" in said, said


def test_a_rank_that_is_stuck_in_c_code_is_found_too(tmp_path):
    """It holds the interpreter's lock: no thread of Python's could say so."""
    end = rank_process(tmp_path, "dog.beat('x', 7); dog.beat('micro-batch 0', 8); sum(range(10**13))")
    assert end.returncode == -signal.SIGALRM and "hung in micro-batch 0, 8 updates done" in diagnose(tmp_path, 1)


def test_a_rank_that_makes_progress_is_left_alone(tmp_path):
    end = rank_process(tmp_path, """
        for number in range(40):
            dog.beat("micro-batch 0", number)
            time.sleep(0.02)
    """)  # fmt: skip
    assert end.returncode == 0 and end.stdout == "done\n", end.stderr
    assert diagnose(tmp_path, 1) == "" and read_rank(tmp_path, 0)["update"] == 39


def test_a_rank_that_was_only_slow_leaves_no_stack(tmp_path):
    """Or it would be taken for the cause of what ends the job later."""
    end = rank_process(tmp_path, """
        watchdog.GRACE_SECONDS = 60
        dog.beat("micro-batch 0", 7)
        dog.beat("micro-batch 1", 8)
        time.sleep(0.7)
        assert Path(sys.argv[1], "rank-0.stack").stat().st_size > 0
        dog.beat("micro-batch 2", 8)
        assert Path(sys.argv[1], "rank-0.stack").stat().st_size == 0
        time.sleep(0.7)
        print(watchdog.diagnose(Path(sys.argv[1]), 1))
        dog.beat("micro-batch 3", 8)
    """)  # fmt: skip
    assert end.returncode == 0, end.stderr
    assert "hung in micro-batch 2, 8 updates done" in end.stdout and "\0" not in end.stdout
    assert diagnose(tmp_path, 1) == ""


def test_the_grace_grows_with_the_limit():
    """Who waits for a rank that hangs may have made its last beat a whole micro-batch earlier."""
    assert grace_seconds(10.0) == 5.0 and grace_seconds(600.0) == 30.0


def test_after_it_nothing_goes_off(tmp_path):
    end = rank_process(tmp_path, """
        dog.beat("micro-batch 0", 7)
        dog.beat("micro-batch 0", 8)
        dog.__exit__()
        other = open(sys.argv[1] + "/other", "w")  # where the file of the stacks was open
        time.sleep(0.8)
        dog.__enter__()
    """)  # fmt: skip
    assert end.returncode == 0 and end.stdout == "done\n", end.stderr
    assert (tmp_path / "other").read_text() == ""


def test_the_first_update_may_take_longer(tmp_path):
    end = rank_process(tmp_path, """
        dog.beat("micro-batch 0", 7)
        time.sleep(0.8)
        dog.beat("micro-batch 0", 8)
    """)  # fmt: skip
    assert end.returncode == 0, end.stderr


# --- what is read out of several ranks' files

SLEEPS = ("/code/loop.py", 12, "forward")
STACK = """Timeout (0:10:00)!
Thread 0x0000000000000def (most recent call first):
  File "/lib/threading.py", line 1 in wait

Thread 0x0000000000000abc (most recent call first):
  File "{}", line {} in {}
  File "/code/main.py", line 1 in main
"""
WAITS = ("/lib/torch/distributed/distributed_c10d.py", 3000, "all_reduce")


@pytest.fixture
def ranks(tmp_path):
    """A function: the files of ranks that each give (updates done, beats, innermost frame or None)."""

    def write(*given):
        for rank, (update, beats, frame) in enumerate(given):
            record = {"rank": rank, "host": f"h{rank}", "pid": 1, "thread": 0xABC, "update": update, "beats": beats,
                      "phase": "micro-batch 1", "time": 0.0}  # fmt: skip
            (tmp_path / f"rank-{rank}.json").write_text(json.dumps(record).ljust(RECORD_BYTES))
            stack = STACK.format(*frame) if frame else ""
            (tmp_path / f"rank-{rank}.stack").write_text(stack)
        return tmp_path

    return write


def test_the_rank_that_hung_is_told_from_those_that_wait_for_it(ranks):
    assert diagnose(ranks((3, 9, WAITS), (3, 9, SLEEPS), (3, 9, WAITS)), 3) == (
        "rank 1 on h1 hung in micro-batch 1, 3 updates done, at /code/loop.py:12 forward; ranks 0, 2 only waited for it"
    )


def test_a_frozen_rank_is_known_by_its_silence(ranks):
    said = diagnose(ranks((3, 9, WAITS), (3, 9, None)), 2)
    assert said.startswith("rank 1 on h1 was frozen in micro-batch 1, 3 updates done, and could not write its stack; ")
    assert said.endswith("; rank 0 only waited for it")


def test_who_waits_for_the_end_of_an_exchange_waits(ranks, tmp_path):
    """Its innermost frame lies in the file that began the exchange; the line tells."""
    code = tmp_path / "exchange.py"
    code.write_text("def arrive(work):\n    work.wait()\n")
    said = diagnose(ranks((3, 9, (str(code), 2, "arrive")), (3, 9, SLEEPS)), 2)
    assert said.startswith("rank 1 on h1 hung") and said.endswith("; rank 0 only waited for it")


def test_where_all_wait_it_is_the_one_that_is_behind(ranks):
    said = diagnose(ranks((4, 9, WAITS), (3, 9, WAITS)), 2)
    assert said.startswith("rank 1 on h1 hung") and said.endswith("; rank 0 only waited for it")


def test_files_of_a_larger_job_before_it_say_nothing(ranks):
    assert diagnose(ranks((3, 9, None), (3, 9, SLEEPS)), 1) == ""


def test_a_rank_that_has_said_nothing_yet(tmp_path, ranks):
    assert read_rank(tmp_path, 0) is None and diagnose(tmp_path, 2) == ""
    ranks((3, 9, WAITS))
    assert diagnose(tmp_path, 2) == "rank 1 was frozen and could not write its stack; rank 0 only waited for it"
