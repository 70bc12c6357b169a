"""What the tests of the model, the data and the training share: small, and the same in every run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from moe.data.loader import Batch
from moe.model import Decoder

ROOT = Path(__file__).parents[2]
RANK_SECONDS = 120  # that ranks may take on a busy machine

TRAIN = dict(
    steps=6, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup_steps=1, evaluate_every=100,
    checkpoint_every=3,
)  # fmt: skip


@pytest.fixture(scope="session")
def free_port():
    """A function: a port nobody listens at."""

    def port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return port


@pytest.fixture(scope="session")
def start_ranks(free_port):
    """A function: start a script as so many ranks of a process group, each on one thread; their processes, and logs."""

    def start(world_size: int, script: Path, argument: Path, folder: Path) -> tuple[list[subprocess.Popen], list[Path]]:
        common = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        logs = [folder / f"{script.stem}-{rank}-of-{world_size}.log" for rank in range(world_size)]
        ranks = []
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                ranks.append(subprocess.Popen(
                    [sys.executable, str(script), str(argument)],
                    env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=file, stderr=subprocess.STDOUT,
                ))  # fmt: skip
        return ranks, logs

    return start


@pytest.fixture(scope="session")
def run_ranks(start_ranks):
    """A function: the same, to their end."""

    def run(world_size: int, script: Path, argument: Path, folder: Path, seconds: float = RANK_SECONDS) -> None:
        ranks, logs = start_ranks(world_size, script, argument, folder)
        try:
            ends = [rank.wait(timeout=seconds) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert ends == [0] * world_size, "\n".join(log.read_text()[-3000:] for log in logs)

    return run


@pytest.fixture
def values(tokenizer):
    """A whole config as plain values, which a test may change."""
    noise = {"noise_documents": 40, "held_out_share": 0.2}
    plain = json.dumps(  # a copy in which no two sections are one object
        {
            "run": {"name": "test", "seed": 1},
            "tokenizer": {"vocab_size": tokenizer.get_vocab_size()},
            "model": {
                "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24, "context_length": 16,
            },
            "public": noise,
            "owners": {"billing": {"slot": 1, "data": noise}, "radiology": {"slot": 2, "data": noise}},
            "anchor": TRAIN,
            "pack": {"train": TRAIN, "replay_share": 0.125},
        }
    )  # fmt: skip
    return json.loads(plain)


@pytest.fixture
def make_batch(tokenizer):
    """A function: documents of these lengths, random tokens, each labelled with the one after it."""

    def batch(*lengths: int, seed: int = 0, vocabulary: int | None = None) -> Batch:
        edges = [0]
        for length in lengths:
            edges.append(edges[-1] + length)
        generator = torch.Generator().manual_seed(seed)
        token_T = torch.randint(vocabulary or tokenizer.get_vocab_size(), (edges[-1],), generator=generator)
        label_T = token_T.roll(-1)
        label_T[[edge - 1 for edge in edges[1:]]] = kernels.IGNORED
        return Batch(token_T, label_T, kernels.documents(edges), ())

    return batch


@pytest.fixture
def logits():
    """A function: a decoder's logits for a batch, [T, V] in the decoder's dtype."""

    @torch.no_grad()
    def of(decoder: Decoder, batch: Batch) -> torch.Tensor:
        return decoder(batch.token_T, batch.documents).hidden_TD @ decoder.head_weight.T

    return of
