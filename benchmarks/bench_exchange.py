"""Time a mixture layer whose experts are spread over ranks, and what of the exchange hides behind the computing.

    python -m benchmarks.bench_exchange --ranks 2                        # gloo over the loopback; NCCL where GPUs are
    python -m benchmarks.bench_exchange --ranks 2 --link 1gbit           # on two hosts joined by such a link (root)

Forward and backward of one layer, on every rank its own tokens. Ways to do it, in rounds shuffled alike on all ranks:

    no exchange       every rank has all experts: the computing alone, shared expert included
    exchange alone    the rows there and back, forward and backward, and nothing else
    in turn           the shared expert first, then the exchange and the experts
    beside shared     the shared expert while the rows travel
    N chunks          and the tokens in N parts, one computed while another travels

"hidden" is the share of the time in turn that exceeds the computing alone, and that the way does not need. On one
machine the ranks' exchange takes the cores that compute; over a link it waits, and that can be hidden.
"""

import argparse
import contextlib
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.hosts import INTERFACE, hosts
from benchmarks.records import append, environment
from moe.config import MixtureConfig
from moe.model.mixture import MixtureFFN
from moe.parallel import ALONE, Mesh, exchange
from moe.parallel.exchange import Splits

SECONDS = 600  # that ranks may take


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if "RANK" in os.environ:
        return measure(options)
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(hosts(options.ranks, options.link)) if options.link else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        launch(options, where, sys.argv[1:] if arguments is None else list(arguments), folder)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.bench_exchange", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ranks", type=int, default=2)
    made.add_argument("--link", metavar="RATE", help="of a network between the ranks, as `tc` writes it, such as 1gbit")
    made.add_argument("--shape", default="2048,256,512,8,2", metavar="T,D,F,E,K", help="T tokens on each rank")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    made.add_argument("--chunks", type=int, nargs="+", default=[2, 4])
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--out", type=Path, help="append one JSON line for each way to this file")
    return made


def launch(options: argparse.Namespace, where: list | None, arguments: list[str], folder: Path) -> None:
    """One process for each rank, on hosts of their own where there are some."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(options.ranks), "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
              "MASTER_ADDR": where[0].address if where else "127.0.0.1",
              **({"GLOO_SOCKET_IFNAME": INTERFACE} if where else {})}
    ranks = []
    for rank in range(options.ranks):
        argv = [sys.executable, "-m", "benchmarks.bench_exchange", *arguments]
        own = {"RANK": str(rank), "LOCAL_RANK": "0" if where else str(rank), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        argv = where[rank].command(argv) if where else argv
        ranks.append(subprocess.Popen(argv, env={**os.environ, **common, **own}))
    try:
        for rank in ranks:
            if rank.wait(timeout=SECONDS):
                raise SystemExit("a rank failed; what it said stands above")
    finally:
        for rank in ranks:
            rank.kill()


def measure(options: argparse.Namespace) -> int:
    """One rank's part."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.ranks))
    dist.init_process_group("nccl" if gpu else "gloo")
    T, D, F, E, K = map(int, options.shape.split(","))
    mesh = Mesh.of(options.ranks)
    calls = ways(mesh, MixtureConfig(num_experts=E, top_k=K, d_ff=F, shared_d_ff=F), T, D, options, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for number in range(options.rounds + 1):
        shuffle(order)  # alike on all ranks: who exchanges with whom must agree
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            calls[name]()
            if gpu:
                torch.cuda.synchronize(device)
            if number:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    if mesh.rank == 0:
        report(options, {name: statistics.median(found) for name, found in times.items()}, device)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def ways(mesh: Mesh, config: MixtureConfig, T: int, D: int, options: argparse.Namespace,
         device: torch.device) -> dict[str, Callable[[], None]]:
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(mesh.rank)
    x_TD = torch.randn(T, D, generator=generator).to(device, dtype).requires_grad_()
    dout_TD = torch.randn(T, D, generator=generator).to(device, dtype)

    def layer(mesh: Mesh, chunks: int = 1) -> MixtureFFN:
        made = MixtureFFN.ordinary(D, config, mesh, chunks)
        torch.manual_seed(0)
        for name, parameter in made.named_parameters():
            torch.nn.init.normal_(parameter, std=1.0 if name == "router.table" else 0.02)
        made.experts.to(dtype)
        made.shared.to(dtype)
        return made.to(device)

    def run(made: MixtureFFN, in_turn: bool = False) -> Callable[[], None]:
        shared = made.shared
        if in_turn:
            made.shared = None

        def call() -> None:
            base_TD = shared.alone(x_TD) if in_turn else None
            out_TD, _ = made(x_TD)
            (out_TD if base_TD is None else out_TD + base_TD).backward(dout_TD)

        return call

    rows = torch.randn(T * config.top_k, D, device=device).to(dtype).requires_grad_()
    each = T * config.top_k // mesh.expert_size
    splits = Splits([each] * mesh.expert_size, [each] * mesh.expert_size)

    def exchange_alone() -> None:
        there = exchange.finish(*exchange.begin(rows, splits, mesh.group))
        exchange.finish(*exchange.begin(there, splits.reversed(), mesh.group)).backward(rows.detach())

    return {
        "no exchange": run(layer(ALONE)),
        "exchange alone": exchange_alone,
        "in turn": run(layer(mesh), in_turn=True),
        "beside shared": run(layer(mesh)),
        **{f"{chunks} chunks": run(layer(mesh, chunks)) for chunks in options.chunks},
    }


def report(options: argparse.Namespace, ms: dict[str, float], device: torch.device) -> None:
    beyond = ms["in turn"] - ms["no exchange"]
    rows = []
    for name, median in ms.items():
        row = {"op": "exchange", "shape": dict(zip("TDFEK", map(int, options.shape.split(",")), strict=True)),
               "dtype": options.dtype, "ranks": options.ranks, "link": options.link or "none", "provider": name,
               "ms": median}
        if name not in ("no exchange", "exchange alone", "in turn"):
            row["hidden"] = (ms["in turn"] - median) / beyond
        rows.append(row)
        if options.out:
            append(options.out, {**row, **environment(device.type)})
    width = max(map(len, ms))
    print(f"\n{options.ranks} ranks, link {options.link or 'none'}, T,D,F,E,K {options.shape}, {options.dtype}")
    for row in rows:
        hidden = f"   hidden {row['hidden']:5.0%}" if "hidden" in row else ""
        print(f"  {row['provider']:{width}} {row['ms']:9.1f} ms{hidden}")


if __name__ == "__main__":
    raise SystemExit(main())
