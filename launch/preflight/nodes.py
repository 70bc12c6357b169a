"""The checks on each node of a running Ray cluster, and what only several nodes can show: clocks and versions that
differ.
"""

import socket
import time
from dataclasses import dataclass
from typing import Any

from launch.preflight.finding import Finding
from moe.errors import InputError

CONNECT_SECONDS = 5.0
SECONDS = 60.0  # for a node to answer
SKEW_SECONDS = 1.0  # between clocks, from which on logs cannot be compared
ROUNDS = 3  # of asking for the time; the quickest answer counts


@dataclass(frozen=True)
class Answer:
    """Of one node."""

    host: str
    findings: tuple[Finding, ...] = ()
    skew: float = 0.0  # seconds that its clock is ahead of ours
    bound: float = 0.0  # of the error in that
    error: str = ""  # why there are none of these


def ask(address: str, config: dict[str, Any] | None) -> list[Answer]:
    """Have all nodes checked at once. `config` as plain values. Raises InputError where no cluster answers."""
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdigit():  # else it is auto: Ray looks it up. Where nobody listens it would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        import ray

        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, OverflowError, ValueError) as error:  # Ray's ConnectionError is an OSError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"--address={address}: no Ray cluster answers there ({reason}); want HOST:6379 of its head, "
                         "or auto on one of its nodes") from error
    try:
        return _ask_all(config)
    finally:
        ray.shutdown()


def _ask_all(config: dict[str, Any] | None) -> list[Answer]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    hosts = named({node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]})
    where = {node: dict(num_cpus=0, scheduling_strategy=On(node, soft=False)) for node in hosts}
    asked = {node: ray.remote(**where[node])(_check).remote(config) for node in hosts}
    answers = []
    for node, host in hosts.items():
        try:
            findings = tuple(Finding(**each) for each in ray.get(asked[node], timeout=SECONDS))
            skew, bound = _skew(ray.remote(**where[node])(_now))
            answers.append(Answer(host, findings, skew, bound))
        except Exception as error:  # whatever keeps a node from answering is what is wrong with it
            first_line = next(iter(str(error).strip().splitlines()), "")
            answers.append(Answer(host, error=f"{type(error).__name__}: {first_line}"))
    return answers


def _check(config: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Runs on the node."""
    from dataclasses import asdict

    from launch.preflight.checks import run
    from moe.config_file import check

    return [asdict(finding) for finding in run(check(config) if config else None)]


def _now() -> float:
    return time.time()


def named(hosts: dict[str, str]) -> dict[str, str]:
    """A name for each node: its host's, with the node's id where a host has several."""
    several = {host for host in hosts.values() if list(hosts.values()).count(host) > 1}
    return {node: f"{host} ({node[:6]})" if host in several else host for node, host in hosts.items()}


def _skew(clock: Any) -> tuple[float, float]:
    """(seconds that a node's clock is ahead, bound of the error), from the quickest of a few answers."""
    import ray

    best = (0.0, float("inf"))
    for _ in range(ROUNDS):
        before = time.time()
        there = ray.get(clock.remote(), timeout=SECONDS)
        after = time.time()
        if (after - before) / 2 < best[1]:
            best = there - (before + after) / 2, (after - before) / 2
    return best


def across(answers: list[Answer]) -> list[Finding]:
    """What the nodes say together."""
    found = []
    silent = {answer.host: answer.error for answer in answers if answer.error}
    if silent:
        host, error = next(iter(silent.items()))
        found.append(Finding("nodes", "wrong", f"{', '.join(silent)} cannot be checked ({error})",
                             "install the same polyclinic in the same place on all nodes"))  # fmt: skip
    else:
        found.append(Finding("nodes", "ok", f"{len(answers)} have answered"))
    heard = [answer for answer in answers if not answer.error]
    if len(heard) < 2:
        return found
    for name in ("versions", "GPUs"):
        said = {answer.host: finding.what for answer in heard for finding in answer.findings if finding.name == name}
        usual = max(said.values(), key=list(said.values()).count, default="")
        odd = [host for host, what in said.items() if what != usual]
        if odd:
            found.append(Finding(f"same {name}", "wrong", f"{', '.join(odd)}: {said[odd[0]]}; the others: {usual}",
                                 "make the nodes alike, or leave those out"))  # fmt: skip
        else:
            found.append(Finding(f"same {name}", "ok", f"on {len(heard)} nodes"))
    found.append(clocks(heard))
    return found


def clocks(answers: list[Answer]) -> Finding:
    ahead, behind = max(answers, key=lambda answer: answer.skew), min(answers, key=lambda answer: answer.skew)
    apart, unsure = ahead.skew - behind.skew, ahead.bound + behind.bound
    what = f"{apart:.2f} s apart at most, give or take {unsure:.2f} s"
    if apart - unsure > SKEW_SECONDS:
        return Finding("same time", "warning", f"{ahead.host} is {what.replace(' at most', '')} ahead of {behind.host}",
                       "set the clocks by NTP: logs of different nodes cannot be compared")
    return Finding("same time", "ok", what)
