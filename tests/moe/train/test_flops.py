"""Training flops by hand: 6 for a trained parameter a token uses, 4 for a frozen one."""

import torch

from moe.model import Decoder
from moe.train.flops import matmul_flops_per_s, training_flops_per_token

# Of the tiny model: d_model 32, 2 layers, 4 query heads and 2 key heads of 8, d_ff 24, vocabulary 280.
EMBEDDING = 280 * 32
ATTENTION = 32 * 32 + 2 * (32 * 16) + 32 * 32 + 2 * 8  # q, k and v, o, and the two norms of a head
EXPERT = 3 * 32 * 24
NORMS = 2 * 32  # of a layer; one more follows the last
SHARED = EMBEDDING + 2 * (ATTENTION + NORMS) + 32


def test_a_dense_model(make_model):
    assert training_flops_per_token(make_model()) == 6 * (SHARED + 2 * EXPERT)


def test_a_head_of_its_own_is_a_product_and_the_embedding_is_none(model_config):
    untied = Decoder(model_config(tie_embeddings=False), 280)
    assert training_flops_per_token(untied) == 6 * (SHARED + 2 * EXPERT)


def test_a_pack_reads_the_anchor_and_trains_its_own(make_model):
    assert training_flops_per_token(make_model("pack")) == 4 * (SHARED + 2 * EXPERT) + 6 * 2 * EXPERT


def test_a_mixture_uses_some_of_its_experts(model_config):
    mixture = Decoder(model_config(top_k=2), 280, slots=(0, 1, 2, 3, 9))
    router = 16 * 32 + 16
    want = 6 * (SHARED + 2 * (2 * EXPERT + router))  # two of five experts a token
    assert abs(training_flops_per_token(mixture) / want - 1) < 1e-12
    mixture.use((0,))
    want = 6 * (SHARED + 2 * (EXPERT + router))
    assert abs(training_flops_per_token(mixture) / want - 1) < 1e-12


def test_the_peak_is_a_rate(monkeypatch):
    monkeypatch.setattr("moe.train.flops.PROBE_WIDTH", 256)
    rate = matmul_flops_per_s(torch.device("cpu"), torch.float32)
    assert 1e7 < rate < 1e15  # any machine this runs on
