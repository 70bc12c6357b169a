"""The tokenizer gives every text back, spells digits one by one, and is the same bytes for the same texts."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from moe.data import tokenizer as tokenizers
from moe.data.tokenizer import (
    OWN,
    SPECIAL,
    Special,
    encode,
    ends,
    fits,
    identity,
    load,
    load_config,
    num_ids,
    special_of,
    train,
)
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


# --- tokenizers of other families


def words(count, *special, first_special=None):
    """A tokenizer of whole words, with special tokens behind them."""
    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(count)} | dict(zip(
        special, range(first_special or count, count + 99), strict=False)), unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    return made


END = "<|endoftext|>"


@pytest.mark.parametrize("config, special, framed", [
    pytest.param({"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}, Special("<s>", "</s>", None),
                 [10, 3, 4, 11], id="llama-2"),
    pytest.param({"bos_token": END, "eos_token": END, "pad_token": END}, Special(END, END, END), [12, 3, 4, 12],
                 id="smollm2"),
    pytest.param({"bos_token": None, "eos_token": END, "pad_token": END}, Special(END, END, END), [12, 3, 4, 12],
                 id="qwen3"),
    pytest.param({"eos_token": {"content": "</s>", "lstrip": False}}, Special("</s>", "</s>", None), [11, 3, 4, 11],
                 id="as-it-was-once-written"),
])  # fmt: skip
def test_a_document_stands_between_the_tokens_that_its_tokenizer_has_for_it(config, special, framed):
    made = words(10, "<s>", "</s>", END)
    assert special_of(config) == special
    assert encode(made, ["w3 w4"], special) == [framed]
    assert identity(made, special) != identity(made) and identity(made, OWN) == identity(made)


def test_without_a_config_it_is_one_of_ours(tmp_path, tokenizer):
    assert special_of(load_config(tmp_path / "tokenizer.json")) == OWN
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="tokenizer_config.json holds no object"):
        load_config(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("config", [{}, {"bos_token": "<s>"}, {"eos_token": "<|gone|>"}])
def test_a_tokenizer_that_cannot_end_a_document_is_refused(config):
    for use in (ends, lambda made, special: encode(made, ["w1"], special)):
        with pytest.raises(InputError, match="no tokens to begin and to end a document with .* want at least eos"):
            use(words(10, "<s>"), special_of(config))


def test_an_embedding_may_have_rows_to_spare_but_not_of_ours(tokenizer):
    gaps = words(95, "<s>", first_special=97)
    assert (gaps.get_vocab_size(), num_ids(gaps)) == (96, 98)
    assert [fits(gaps, rows) for rows in (96, 97, 98, 106, 107)] == [False, False, True, True, False]
    assert [fits(tokenizer, rows) for rows in (279, 280, 281)] == [False, True, False]


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
