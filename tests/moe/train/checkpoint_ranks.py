"""What test_checkpoint_ranks.py looks at: ranks over gloo, without an engine, that save, load, and are killed at it.

    python tests/moe/train/checkpoint_ranks.py FOLDER

Every rank is a fork of one process, which has paid for the imports. Each job leaves FOLDER/JOB.RANK.json: what the rank
gave back, or what it raised; the file is missing where the rank was killed.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from moe import manifest as manifests
from moe.train import together
from moe.train.checkpoint import Saver, State, files, gather, restore, save

DESCRIPTION = {"model": "none"}
FOLDER = Path(sys.argv[1])
BUCKET_BYTES = 4 * 30  # less than a tensor: everything travels in many rounds
SECONDS = 60

SHAPES = {
    "embedding": (40, 8), "experts": (6, 5, 4), "norm": (8,), "scale": (), "large": (700,), "nothing": (0, 3),
    "norm.exp_avg": (8,), "large.exp_avg": (700,),
}  # fmt: skip
BUFFER = "router.bias"


class Piece(NamedTuple):
    """As the engine's, which would load DeepSpeed."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: torch.Tensor


class FakeEngine:
    """An engine's state without a model, in pieces as ZeRO and expert parallelism leave them: `experts` are spread over
    the ranks, all else but the buffer is one flat vector that the ranks share unevenly."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size, self.updates = rank, world_size, None
        self.held = {name: torch.zeros(shape) for name, shape in (*SHAPES.items(), (BUFFER, (6,)))}

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.held.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def pieces(self) -> list[Piece]:
        return [Piece(name, tuple(self.held[name].shape), start, self.held[name].view(-1)[start:end])
                for name, start, end in self._spans()]

    def load(self, read, updates: int) -> None:
        for name, start, end in reversed(self._spans()):
            self.held[name].view(-1)[start:end] = read(name, start, end - start)
        self.held[BUFFER].copy_(read(BUFFER, 0, 6))
        self.updates = updates

    def _spans(self) -> list[tuple[str, int, int]]:
        rank, world_size = self.rank, self.world_size
        experts = self.held["experts"].numel()
        spans = [("experts", experts * rank // world_size, experts * (rank + 1) // world_size)]
        flat = {name: self.held[name].numel() for name in SHAPES if name != "experts"}
        # Parts that grow with the rank, and whose edges fall within tensors.
        edges = [sum(flat.values()) * r * (r + 1) // (world_size * (world_size + 1)) for r in range(world_size + 1)]
        first = 0
        for name, numel in flat.items():
            start, end = (min(max(edge - first, 0), numel) for edge in edges[rank : rank + 2])
            if end > start or (numel == 0 and rank == 0):
                spans.append((name, start, end))
            first += numel
        return [*spans, (BUFFER, 0, 6)] if rank == 0 else spans


def run(world_size: int, job: str, *arguments) -> None:
    """Do a job on so many ranks."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(rank, world_size, job, arguments)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    for process in ranks:
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{job} has not ended")


def _rank(rank: int, world_size: int, job: str, arguments: tuple) -> None:
    name = "-".join([job, *map(str, arguments), str(world_size)])
    store = dist.FileStore(str(FOLDER / f"{name}.store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        said = JOBS[job](FakeEngine(rank, world_size), *arguments)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (FOLDER / f"{name}.{rank}.json").write_text(json.dumps(said))


def write(engine: FakeEngine, folder: str, *steps: int) -> list[int]:
    """Save each step's state; return the most bytes that an exchange sent and received."""
    saver, most = Saver(FOLDER / folder, engine, "mine", DESCRIPTION), [0, 0]

    def all_to_all(received, sent, *counts):
        most[:] = max(most[0], 4 * sent.numel()), max(most[1], 4 * received.numel())
        return exchange(received, sent, *counts)

    exchange, dist.all_to_all_single = dist.all_to_all_single, all_to_all
    for step in steps:
        engine.fill(step)
        saver.save(State(step, 4 * step))
        engine.fill(0)  # training goes on
        saver.poll()
    saver.finish()
    return most


def read(engine: FakeEngine, folder: str, into: str = "") -> int:
    """Restore, and save what was loaded `into` another folder."""
    state = restore(FOLDER / folder, engine, "mine")
    assert engine.updates == (state.step or None)
    if into:
        saver = Saver(FOLDER / f"{into}-{engine.world_size}", engine, "mine", DESCRIPTION)
        saver.save(state)
        saver.finish()
    return state.step


def killed(engine: FakeEngine, folder: str) -> str:
    """Rank 1 dies by kill -9 while its thread writes; the step before is whole."""
    saver = Saver(FOLDER / folder, engine, "mine", DESCRIPTION)
    saver.save(State(3))
    saver.finish()
    engine.fill(6)
    if engine.rank == 1:
        written = save.write_shard

        def die(path: Path, tensors: dict, pace) -> None:
            written(path, dict(list(tensors.items())[:1]), pace)
            os.kill(os.getpid(), signal.SIGKILL)

        save.write_shard = die
    saver.save(State(6))
    saver.finish()
    return "a rank has died, and the other has noticed nothing"


def begin(engine: FakeEngine, folder: str) -> None:
    Saver(FOLDER / folder, engine, "mine", DESCRIPTION)


def full(engine: FakeEngine, folder: str) -> list[str]:
    """The disk of rank 1 is full; then it is not."""
    write(engine, folder, 3)
    saver, written = Saver(FOLDER / folder, engine, "mine", DESCRIPTION), save.write_shard
    if engine.rank == 1:
        def no_space(path: Path, *_) -> None:
            raise OSError(28, "No space left on device", str(path))

        save.write_shard = no_space
    saver.save(State(6))
    try:
        saver.finish()
        said = "nothing"
    except save.SaveFailed as error:
        said = str(error)
    names = sorted(os.listdir(FOLDER / folder))
    dist.barrier()
    save.write_shard = written
    saver.save(State(9))
    saver.finish()
    return [said, names, sorted(os.listdir(FOLDER / folder))]


def waits(engine: FakeEngine) -> list[int]:
    """Rank 0 has work that goes on for three beats; return the beats that were heard, and what came of the work."""
    heard = []

    def work() -> int:
        while len(heard) < 3:
            sum(range(1000))
        return len(heard)

    done = together.together(work if engine.rank == 0 else None, engine.device, heard.append, "working")
    return [len(heard), done]


def apart(engine: FakeEngine, folder: str) -> int:
    """Rank 1 looks elsewhere, as on a node whose disk is its own."""
    return restore(FOLDER / (folder if engine.rank == 0 else "elsewhere"), engine, "mine").step


def write_apart(engine: FakeEngine, folder: str) -> None:
    write(engine, f"{folder}-of-rank-{engine.rank}", 3)


def unreadable(engine: FakeEngine, folder: str) -> int:
    """On rank 1 the library gives no tensor of step 6."""
    if engine.rank == 1:
        opened = files._open

        class Shard:
            def __init__(self, path: Path):
                self.keys = opened(path).keys

            def get_tensor(self, name: str) -> None:
                raise SafetensorError("no such dtype")

        files._open = lambda path: Shard(path) if path.parent.name == "step-00000006" else opened(path)
    return restore(FOLDER / folder, engine, "mine").step


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


JOBS = {"write": write, "read": read, "killed": killed, "begin": begin,
        "full": full, "waits": waits, "apart": apart, "write_apart": write_apart, "unreadable": unreadable}

if __name__ == "__main__":
    torch.set_num_threads(1)
    gather.BUCKET_BYTES = BUCKET_BYTES
    together.SLICE_SECONDS = 0.05
    for world_size in (1, 2, 4):
        run(world_size, "write", f"by-{world_size}", 3, 6)
    for written_by, read_by in ((4, 1), (1, 2), (4, 2), (2, 4)):
        run(read_by, "read", f"by-{written_by}", f"by-{written_by}-then")
    run(2, "apart", "by-4")
    shutil.copytree(FOLDER / "by-4", FOLDER / "flipped")
    flip(FOLDER / "flipped/step-00000006/shard-00003-of-00004.safetensors")
    run(2, "read", "flipped")
    shutil.copytree(FOLDER / "by-4", FOLDER / "unread")
    run(2, "unreadable", "unread")
    shutil.copytree(FOLDER / "by-2", FOLDER / "other-version")
    manifests.write(FOLDER / "other-version/step-00000006/manifest.json", {"schema": 1})
    run(2, "read", "other-version")
    flip(FOLDER / "by-2/step-00000003/shard-00000-of-00002.safetensors")
    (FOLDER / "by-2/step-00000006/shard-00001-of-00002.safetensors").unlink()
    run(2, "read", "by-2")
    run(2, "killed", "killed")
    run(2, "begin", "killed")
    run(2, "read", "killed", "killed-then")
    run(2, "full", "full")
    run(2, "waits")
    run(2, "write_apart", "apart")
