"""The byte-level BPE tokenizer. In a specialty run it is part of the anchor, so it is trained on public text only; in
an ordinary job it is trained on the first domain's, or is that of the model which the job begins with.

Every document becomes  <|bos|> tokens <|eos|>. Digits are single tokens, so that codes and measurements are
spelled the same way everywhere.

A model that was imported has its own tokenizer, with other tokens around a document. tokenizer_config.json, which lies
beside its tokenizer.json wherever that goes, names them as AutoTokenizer knows them; a tokenizer without one is ours.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe.errors import InputError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL = (BOS, EOS, PAD)  # ids 0, 1, 2
CONFIG = "tokenizer_config.json"
MOST_VACANT = 0.1  # share of an embedding's rows that another family's tokenizer may leave without a token


class Special(NamedTuple):
    """The tokens that are no text, by name; None where a tokenizer has none for it."""

    bos: str | None
    eos: str | None
    pad: str | None


OWN = Special(*SPECIAL)


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
    # For others, who encode a text by AutoTokenizer: it begins as the model knows it.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
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


def load_config(path: Path, name: str = CONFIG) -> dict[str, Any] | None:
    """tokenizer_config.json beside a tokenizer; None where there is none. Raises InputError where it is damaged."""
    path = path.with_name(name)
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no object: want the settings of a tokenizer")
    return config


def special_of(config: dict[str, Any] | None) -> Special:
    """Of a tokenizer with such a tokenizer_config.json. Where no token begins a document, that which ends one does."""
    if config is None:
        return OWN
    bos, eos, pad = (name_of(kind, config) for kind in Special._fields)
    return Special(bos or eos, eos, pad)


def name_of(kind: str, config: dict[str, Any]) -> str | None:
    """Of its token of this kind, which once was written with all its attributes."""
    token = config.get(f"{kind}_token")
    return token.get("content") if isinstance(token, dict) else token


def _as_text_only(tokenizer: Tokenizer) -> Tokenizer:
    """A document that quotes <|eos|> does not end there."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def identity(tokenizer: Tokenizer, special: Special = OWN) -> str:
    """A hash that two tokenizers share only when they encode alike."""
    others = "" if special == OWN else json.dumps(special)
    return hashlib.sha256((tokenizer.to_str() + others).encode()).hexdigest()


def ends(tokenizer: Tokenizer, special: Special = OWN) -> tuple[int, int]:
    """Ids of the tokens that begin and end a document. Raises InputError where it has none."""
    ids = [name if name is None else tokenizer.token_to_id(name) for name in (special.bos, special.eos)]
    if None in ids:
        raise InputError(f"the tokenizer has no tokens to begin and to end a document with (bos_token={special.bos!r}, "
                         f"eos_token={special.eos!r}): want at least eos_token in its {CONFIG}, the name of a token")
    return ids[0], ids[1]


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than its highest id: numbers between may be vacant, so that it has fewer tokens."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def fits(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Whether it can be that of a model whose embedding has so many rows: another family's may have some to spare."""
    if tokenizer.token_to_id(BOS) is not None:
        return num_ids(tokenizer) == vocab_size
    return num_ids(tokenizer) <= vocab_size and tokenizer.get_vocab_size() >= (1 - MOST_VACANT) * vocab_size


def encode(tokenizer: Tokenizer, texts: list[str], special: Special = OWN) -> list[list[int]]:
    """Token ids of each text with <|bos|> before and <|eos|> behind, or what `special` has in their place."""
    bos, eos = ends(tokenizer, special)
    return [[bos, *e.ids, eos] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
