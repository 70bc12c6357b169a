"""The command on a merged model and on an ordinary mixture, with random weights."""

import json

import pytest
import torch
from typer.testing import CliRunner

from launch.cli import app
from moe.config import MixtureConfig, ModelConfig
from moe.data import tokenizer as tokenizers
from moe.errors import InputError
from moe.hf import folder
from moe.hf.folder import ModelFolder
from moe.model import Decoder

SIZES = dict(d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=48, context_length=64, num_slots=8, top_k=2)
TEXT = "the chest film shows 12 ribs, and the pill is taken with water; the bill is paid. " * 40


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train([TEXT], 280)


@pytest.fixture
def saved(tmp_path, tokenizer):
    def save(slots=(), owners=None, **sizes):
        decoder = Decoder(ModelConfig(**SIZES | sizes), 280, slots).initialise(3)
        with torch.no_grad():
            for router in decoder.routers():
                for parameter in router.parameters():
                    parameter.normal_(generator=torch.Generator().manual_seed(5))
        folder.save(tmp_path / "model", ModelFolder(decoder, tokenizer, owners or {}, "0" * 64 if owners else None))
        return str(tmp_path / "model")

    return save


def told(*arguments, **how):
    end = CliRunner().invoke(app, ["generate", *arguments], catch_exceptions=False, **how)
    assert end.exit_code == 0, end.output
    return end.stdout


def test_every_token_with_its_experts_for_scripts(saved):
    model = saved((0, 3, 7), {"radiology": 3, "billing": 7}, top_k=2)
    answer = json.loads(told(model, "the chest", "--max-tokens", "5", "--experts", "--json"))
    tokens = answer["tokens"]
    assert len(tokens) == answer["prompt_tokens"] + 5 or answer["ended"]
    assert "".join(token["text"] for token in tokens[: answer["prompt_tokens"]]) == "<|bos|>the chest"
    assert answer["text"] == "".join(token["text"] for token in tokens[answer["prompt_tokens"] :])
    assert "experts" not in tokens[-1] and all(len(token["experts"]) == 2 for token in tokens[:-1])  # layers
    for token in tokens[:-1]:
        for layer in token["experts"]:
            names, weights = zip(*layer, strict=True)
            assert len(set(names)) == 2 and set(names) <= {"anchor", "radiology", "billing"}
            assert weights[0] >= weights[1] and sum(weights) == pytest.approx(1, abs=1e-3)


def test_only_the_owners_that_are_asked_for(saved):
    model = saved((0, 3, 7), {"radiology": 3, "billing": 7}, top_k=1)
    options = ("--experts", "--json", "--max-tokens", "4")
    for wanted, names in (("billing", {"anchor", "billing"}), ("none", {"anchor"})):
        answer = json.loads(told(model, "the chest film", "--owners", wanted, *options))
        used = {layer[0][0] for token in answer["tokens"][:-1] for layer in token["experts"]}
        assert used == names


def test_text_as_it_comes_equals_the_text_for_scripts(saved):
    model = saved(mixture=MixtureConfig(num_experts=4, top_k=2, d_ff=16))
    for options in ((), ("--experts",)):
        screen = told(model, "the pill", "--max-tokens", "9", *options)
        answer = json.loads(told(model, "the pill", "--max-tokens", "9", "--json"))
        assert screen.startswith(answer["text"]) and "Not for clinical use." in screen
    assert "layer 1" in screen and "<|bos|>" in screen


def test_the_same_seed_draws_the_same_text_from_the_standard_input(saved):
    model = saved()
    first, again, other = (told(model, "--seed", seed, "--json", input="the bill") for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize("arguments, message", [
    (("x", "--owners", "dentist"), "owners dentist cannot be chosen: want a merged model"),
    (("x", "--mix", "patient=1"), "group patient is not in this model: want none, because no pack of it has any"),
    (("",), "the prompt is empty"),
    (("x", "--top-p", "0"), "--top-p 0: want more than 0"),
    (("x", "--temperature", "inf"), "--temperature inf: want 0, or at least 1e-06 and finite"),
    (("x", "--temperature", "1e-40"), "--temperature 1e-40: want 0, or at least 1e-06 and finite"),
    (("\udcff",), "the prompt is not in UTF-8"),
    (("the chest film " * 60,), "the prompt has .* tokens: want fewer than model.context_length="),
])
def test_refuses(arguments, message, saved):
    with pytest.raises(InputError, match=message):
        told(saved(), *arguments)
