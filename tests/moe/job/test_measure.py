"""What is measured of held-out text: each domain for itself, all of it by its bytes, and where the tokens go."""

import pytest
import torch

from moe.eval.bits import count_bits
from moe.job.measure import measure
from moe.model import Decoder

MIXTURE = dict(num_experts=4, top_k=2, d_ff=24)


@pytest.fixture
def domains(packed, make_documents):
    return {name: packed(make_documents(count, seed), name) for name, count, seed in (("a", 30, 1), ("b", 5, 2))}


@pytest.fixture
def mixture(model_config):
    return Decoder(model_config(mixture=MIXTURE), 280).initialise(1)


def test_all_text_is_the_domains_by_their_bytes(mixture, domains):
    figures = measure(mixture, mixture, domains, None)
    apart = {name: count_bits(mixture, packed, None) for name, packed in domains.items()}
    assert figures["domains"] == {
        name: {"bpb": bits.per_byte, "bytes": bits.num_bytes} for name, bits in apart.items()
    }
    total = sum(bits.total for bits in apart.values()) / sum(bits.num_bytes for bits in apart.values())
    assert figures["bpb"] == pytest.approx(total, rel=1e-12)


@torch.no_grad()
def test_routing_is_told_by_domain_and_the_worst_of_all(mixture, domains):
    router = mixture.layers[1].ffn.router
    router.table.zero_()
    router.selection_bias.copy_(torch.tensor([0.0, 2.0, 0.0, 1.0]))  # every token to experts 1 and 3
    routing = measure(mixture, mixture, domains, None)["routing"]
    assert routing["share"].keys() == domains.keys()
    for layers in routing["share"].values():
        assert layers[1] == [0.0, 0.5, 0.0, 0.5] and sum(layers[0]) == pytest.approx(1, abs=1e-3)
    assert (routing["max_violation"], routing["idle"]) == (1.0, 2) and routing["entropy"] == pytest.approx(0, abs=1e-3)


def test_a_dense_model_has_no_routing(make_anchor, domains):
    decoder, shown = make_anchor().decoder, []
    assert measure(decoder, decoder, domains, 20, shown.append).keys() == {"bpb", "domains"}
    assert len(shown) == 2
