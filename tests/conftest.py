"""For all tests: one thread, because small shapes gain nothing from more and the cores are shared; and tiny documents,
models and packs, the same in every run.

Without a GPU the Triton kernels are made for Triton's interpreter, which has to be said before Triton is imported.
"""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True  # for this process alone: processes that tests start compile for a device
    del os.environ["TRITON_INTERPRET"]

from moe.config import ModelConfig
from moe.data import shards
from moe.data import tokenizer as tokenizers
from moe.data.shards import Document, PackedDocuments
from moe.hf.folder import ModelFolder
from moe.model import Decoder, deltas
from moe.specialty.pack import Pack

VOCABULARY = 280


def pytest_configure() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


def documents(count: int, seed: int = 0, most_words: int = 12) -> list[Document]:
    """Short texts of few words, digits and letters of more than one byte."""
    rng = random.Random(seed)
    words = ["dose", "scan", "claim", "naïve", "10 mg", "x-ray", "I21.4", "µg", "paid", "clear", "lung", "left"]
    return [
        Document(f"row-{seed}-{n}", " ".join(rng.choices(words, k=rng.randint(1, most_words)))) for n in range(count)
    ]


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
def model_config():
    """A function: the sizes of a tiny decoder, some changed."""

    def sizes(**changed) -> ModelConfig:
        plain = dict(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, context_length=16)
        return ModelConfig(**plain | changed)

    return sizes


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
    """A function: a pack as training could have left it, experts near the anchor's, rows and biases not zero, with
    updates of these ranks for stakeholder groups."""

    def pack(anchor: ModelFolder, owner: str, slot: int, **ranks: int) -> Pack:
        generator = torch.Generator().manual_seed(slot)
        decoder, tensors = anchor.decoder, {}
        for number, layer in enumerate(decoder.layers):
            for name in ("w_gate_up", "w_down"):
                weight = getattr(layer.ffn.experts, name).detach()[0]
                noise = torch.randn(weight.shape, generator=generator) * weight.float().std()
                tensors[f"layers.{number}.{name}"] = (weight + 0.5 * noise).to(weight.dtype)
            tensors[f"layers.{number}.row"] = torch.randn(decoder.config.d_model, generator=generator)
            tensors[f"layers.{number}.bias"] = 0.1 * torch.randn((), generator=generator)
            for group, rank in ranks.items():
                for name, shape in deltas.shapes(rank, decoder.config.d_model, decoder.config.d_ff).items():
                    update = torch.randn(shape, generator=generator) * 0.5
                    tensors[f"layers.{number}.deltas.{group}.{name}"] = update.to(decoder.embedding.weight.dtype)
        return Pack(owner, slot, anchor.identity(), tensors, {})

    return pack
