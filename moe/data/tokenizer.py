"""The byte-level BPE tokenizer. In a specialty run it is part of the anchor, so it is trained on public text only; in
an ordinary job it is trained on the first domain's.

Every document becomes  <|bos|> tokens <|eos|>. Digits are single tokens, so that codes and measurements are
spelled the same way everywhere.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.errors import InputError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL = (BOS, EOS, PAD)  # ids 0, 1, 2


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` tokens; the same texts in the same order give the same bytes.

    Raises InputError where the text is too small to yield that many merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise InputError(
            f"tokenizer.vocab_size={vocab_size}: the text it learns from yields only {tokenizer.get_vocab_size()} "
            "tokens; want a smaller vocabulary or more text"
        )
    return _as_text_only(tokenizer)


def load(path: Path) -> Tokenizer:
    """Raises InputError where the file is missing or holds no tokenizer."""
    if not path.is_file():
        raise InputError(f"tokenizer {path} does not exist")
    try:
        return _as_text_only(Tokenizer.from_file(str(path)))
    except Exception as error:  # what the library raises has no type of its own
        raise InputError(f"tokenizer {path} cannot be read: {error}") from error


def _as_text_only(tokenizer: Tokenizer) -> Tokenizer:
    """A document that quotes <|eos|> does not end there."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def identity(tokenizer: Tokenizer) -> str:
    """A hash that two tokenizers share only when they encode alike."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text with <|bos|> before and <|eos|> behind."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    return [[bos, *e.ids, eos] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
