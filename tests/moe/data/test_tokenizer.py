"""The tokenizer gives every text back, spells digits one by one, and is the same bytes for the same texts."""

import pytest

from moe.data import tokenizer as tokenizers
from moe.data.tokenizer import SPECIAL, encode, identity, load, train
from moe.errors import InputError


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("the left lung is clear", id="plain"),
        pytest.param("ICD-10 I21.4, 2.5 mg/kg × 3", id="codes-and-measurements"),
        pytest.param("naïve µg — Größe 肺 🩻", id="bytes-beyond-ascii"),
        pytest.param("  two  spaces\n\ttabs\r\n", id="white-space"),
        pytest.param("\x00\x1b", id="control-characters"),
        pytest.param("x", id="one-letter"),
    ],
)
def test_every_text_comes_back(tokenizer, text):
    (ids,) = encode(tokenizer, [text])
    assert ids[0] == tokenizer.token_to_id("<|bos|>") and ids[-1] == tokenizer.token_to_id("<|eos|>")
    assert tokenizer.decode(ids) == text  # the special tokens are not spelled out


def test_digits_are_single_tokens(tokenizer):
    (ids,) = encode(tokenizer, ["20260131"])
    assert tokenizer.decode_batch([[i] for i in ids[1:-1]]) == list("20260131")


def test_special_tokens_come_first_and_the_size_is_exact(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 280


def test_text_cannot_forge_a_special_token(tokenizer):
    """A document that quotes <|eos|> is text: it neither ends there nor loses a byte."""
    text = "quoted <|eos|> and <|bos|> in a log"
    (ids,) = encode(tokenizer, [text])
    assert set(ids[1:-1]).isdisjoint({0, 1, 2})
    assert tokenizer.decode(ids) == text


def test_the_same_texts_give_the_same_bytes(tokenizer, make_documents):
    texts = [d.text for d in make_documents(200)]
    assert train(texts, 280).to_str() == tokenizer.to_str()
    assert identity(train(texts, 279)) != identity(tokenizer)
    assert identity(train([t.upper() for t in texts], 270)) != identity(train(texts, 270))


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = load(tmp_path / "tokenizer.json")
    assert identity(again) == identity(tokenizer)
    texts = ["the left lung", "10 mg"]
    assert encode(again, texts) == encode(tokenizer, texts)


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(InputError, match="tokenizer.vocab_size=500: .* yields only 26[0-9] tokens"):
        train(["a few words"], 500)


@pytest.mark.parametrize("content", [None, "{broken", "{}"], ids=["missing", "not-json", "not-a-tokenizer"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="tokenizer.json"):
        tokenizers.load(path)
