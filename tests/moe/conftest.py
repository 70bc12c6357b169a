"""What the tests of the model, the data and the training share: small, and the same in every run."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from moe.config import ModelConfig
from moe.data import shards
from moe.data import tokenizer as tokenizers
from moe.data.loader import Batch
from moe.data.shards import Document, PackedDocuments
from moe.hf.folder import ModelFolder
from moe.model import Decoder
from moe.specialty.pack import Pack

VOCABULARY = 280
ROOT = Path(__file__).parents[2]
RANK_SECONDS = 120  # that ranks may take on a busy machine

TRAIN = dict(
    steps=6, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup_steps=1, evaluate_every=100,
    checkpoint_every=3,
)  # fmt: skip


def documents(count: int, seed: int = 0, most_words: int = 12) -> list[Document]:
    """Short texts of few words, digits and letters of more than one byte."""
    rng = random.Random(seed)
    words = ["dose", "scan", "claim", "naïve", "10 mg", "x-ray", "I21.4", "µg", "paid", "clear", "lung", "left"]
    return [
        Document(f"row-{seed}-{n}", " ".join(rng.choices(words, k=rng.randint(1, most_words)))) for n in range(count)
    ]


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


@pytest.fixture(scope="session")
def make_documents():
    return documents


@pytest.fixture(scope="session")
def tokenizer():
    return tokenizers.train((d.text for d in documents(200)), VOCABULARY)


@pytest.fixture
def packed(tmp_path, tokenizer):
    """A function that packs documents into a folder of its own and opens it."""

    def pack(rows: list[Document], name: str = "packed", **options) -> PackedDocuments:
        shards.write(tmp_path / name, rows, tokenizer, **options)
        return PackedDocuments(tmp_path / name)

    return pack


@pytest.fixture
def values():
    """A whole config as plain values, which a test may change."""
    noise = {"noise_documents": 40, "held_out_share": 0.2}
    plain = json.dumps(  # a copy in which no two sections are one object
        {
            "run": {"name": "test", "seed": 1},
            "tokenizer": {"vocab_size": VOCABULARY},
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
def model_config():
    """A function: the sizes of a tiny decoder, some changed."""

    def sizes(**changed) -> ModelConfig:
        plain = dict(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, context_length=16)
        return ModelConfig(**plain | changed)

    return sizes


@pytest.fixture
def make_batch():
    """A function: documents of these lengths, random tokens, each labelled with the one after it."""

    def batch(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Batch:
        edges = [0]
        for length in lengths:
            edges.append(edges[-1] + length)
        token_T = torch.randint(vocabulary, (edges[-1],), generator=torch.Generator().manual_seed(seed))
        label_T = token_T.roll(-1)
        label_T[[edge - 1 for edge in edges[1:]]] = kernels.IGNORED
        return Batch(token_T, label_T, kernels.documents(edges), ())

    return batch


@pytest.fixture
def make_anchor(model_config, tokenizer):
    """A function: a dense model whose weights are far enough from zero for every layer to matter."""

    def anchor(dtype: torch.dtype = torch.float32, seed: int = 5, **sizes) -> ModelFolder:
        decoder = Decoder(model_config(**sizes), VOCABULARY).initialise(seed)
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(8)
        return ModelFolder(decoder.cast(dtype), tokenizer)

    return anchor


@pytest.fixture
def make_pack():
    """A function: a pack as training could have left it, experts near the anchor's, rows and biases not zero."""

    def pack(anchor: ModelFolder, owner: str, slot: int) -> Pack:
        generator = torch.Generator().manual_seed(slot)
        decoder, tensors = anchor.decoder, {}
        for number, layer in enumerate(decoder.layers):
            for name in ("w_gate_up", "w_down"):
                weight = getattr(layer.ffn.experts, name).detach()[0]
                noise = torch.randn(weight.shape, generator=generator) * weight.float().std()
                tensors[f"layers.{number}.{name}"] = (weight + 0.5 * noise).to(weight.dtype)
            tensors[f"layers.{number}.row"] = torch.randn(decoder.config.d_model, generator=generator)
            tensors[f"layers.{number}.bias"] = 0.1 * torch.randn((), generator=generator)
        return Pack(owner, slot, anchor.identity(), tensors, {})

    return pack


@pytest.fixture
def logits():
    """A function: a decoder's logits for a batch, [T, V] in the decoder's dtype."""

    @torch.no_grad()
    def of(decoder: Decoder, batch: Batch) -> torch.Tensor:
        return decoder(batch.token_T, batch.documents).hidden_TD @ decoder.head_weight.T

    return of
