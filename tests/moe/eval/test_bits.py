"""Bits per byte by hand: of a model that knows nothing, and of one that is asked token by token."""

import math
from types import SimpleNamespace

import pytest
import torch

from moe.eval import bits
from moe.eval.bits import bits_per_byte


def test_a_model_that_knows_nothing_pays_the_vocabulary(make_anchor, packed, make_documents):
    anchor, text = make_anchor(), packed(make_documents(30))
    with torch.no_grad():
        anchor.decoder.norm.weight.zero_()  # every logit is 0
    predicted = text.num_tokens - len(text)  # all but <|bos|>
    want = predicted * math.log2(280) / text.manifest["bytes"]
    assert bits_per_byte(anchor.decoder, text, None) == pytest.approx(want, rel=1e-6)


@torch.no_grad()
def test_it_is_the_mean_surprise_of_every_token(make_anchor, packed, make_documents, logits, make_batch, monkeypatch):
    """Token by token, each document alone; however the text is cut into batches."""
    decoder, text = make_anchor(context_length=512).decoder, packed(make_documents(20), tokens_per_shard=100)
    nats = 0.0
    for number in range(len(text)):
        ids = torch.from_numpy(text.tokens(number).astype("int64"))
        batch = make_batch(len(ids) - 1)
        batch.token_T[:] = ids[:-1]
        nats -= logits(decoder, batch).double().log_softmax(-1).gather(1, ids[1:, None]).sum().item()
    want = nats / math.log(2) / text.manifest["bytes"]
    for tokens_per_batch in (1, 50, 10**6):
        monkeypatch.setattr(bits, "TOKENS_PER_BATCH", tokens_per_batch)
        assert bits_per_byte(decoder, text, None) == pytest.approx(want, rel=1e-5)


def test_of_the_first_documents(make_anchor, packed, make_documents):
    rows = make_documents(30)
    decoder, whole = make_anchor().decoder, packed(rows)
    limit = int((whole.lengths[:10] - 1).sum())
    first = packed(rows[:10], "first")
    assert bits_per_byte(decoder, whole, limit) == pytest.approx(bits_per_byte(decoder, first, None), rel=1e-6)
    assert bits_per_byte(decoder, whole, limit) != bits_per_byte(decoder, whole, None)


def test_every_batch_is_shown(make_anchor, packed, make_documents, monkeypatch):
    decoder, text, seen = make_anchor().decoder, packed(make_documents(30)), []
    monkeypatch.setattr(bits, "TOKENS_PER_BATCH", 64)
    bits_per_byte(decoder, text, None, lambda output: seen.append(output.hidden_TD.shape[0]))
    assert len(seen) > 2 and sum(seen) == text.num_tokens - len(text)
    assert all(parameter.grad is None for parameter in decoder.parameters())


@pytest.mark.parametrize("world_size", [4, 5, 20])
def test_all_ranks_call_the_model_as_often_and_count_each_batch_once(
    make_anchor, packed, make_documents, monkeypatch, world_size
):  # fmt: skip
    """Where experts or weights are spread over ranks, one that stays away would leave the others waiting."""
    decoder, text = make_anchor().decoder, packed(make_documents(30))
    monkeypatch.setattr(bits, "TOKENS_PER_BATCH", 64)
    alone = bits.count_bits(decoder, text, None)
    calls, shown, counted = [], [], []
    for rank in range(world_size):
        ranks = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda rank=rank: rank, all_reduce=lambda _: None,
                                get_world_size=lambda: world_size)
        monkeypatch.setattr(bits, "dist", ranks)
        seen, asked = [], []

        def forward(*batch, asked=asked):
            asked.append(batch)
            return decoder(*batch)

        counted.append(bits.count_bits(decoder, text, None, seen.append, forward))
        calls.append(len(asked))
        shown.append(len(seen))
    assert len(set(calls)) == 1 and sum(shown) < world_size * calls[0]  # the last round is not full
    assert sum(own.num_bytes for own in counted) == alone.num_bytes == text.manifest["bytes"]
    assert sum(own.total for own in counted) == pytest.approx(alone.total, rel=1e-6)


def test_a_rank_reads_its_own_batches_only(make_anchor, packed, make_documents, monkeypatch):
    decoder, text = make_anchor().decoder, packed(make_documents(30))
    monkeypatch.setattr(bits, "TOKENS_PER_BATCH", 64)
    tokens, read = text.tokens, []
    monkeypatch.setattr(text, "tokens", lambda *window: read.append(window) or tokens(*window))
    bits.count_bits(decoder, text, None)
    every = sorted(read)
    ranks = []
    for rank in range(2):
        read.clear()
        monkeypatch.setattr(bits, "dist", SimpleNamespace(is_initialized=lambda: True, get_rank=lambda rank=rank: rank,
                                                          get_world_size=lambda: 2, all_reduce=lambda _: None))
        bits.count_bits(decoder, text, None)
        ranks.append(set(read))
    assert ranks[0] | ranks[1] == set(every)
    again = ranks[0] & ranks[1]  # where the last batch leaves rank 1 without one, it goes through rank 0's
    assert len(again) < len(every) / 4
