"""Documents of a domain, split into train, calibration and eval, whatever they come from.

`calibration` exists for a specialty run's public domain only: text on which packs are calibrated, kept apart from what
the anchor is trained on and from what the result is measured on.
"""

import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from moe.config import DataConfig
from moe.data import demonstration, files
from moe.data.shards import Document, write
from moe.data.tokenizer import OWN, Special
from moe.errors import InputError

NOISE_WORDS = 150  # in a document of noise


def check(name: str, config: DataConfig) -> None:
    """Refuse a source that cannot be read, without reading all of it. Cheap: run before anything starts."""
    if config.demonstration:
        demonstration.check_installed(config.demonstration)
    for path in (*config.documents, *config.held_out):
        if path.suffix not in files.ENDINGS:
            raise InputError(f"{name}: {path} has the ending {path.suffix!r}: want .jsonl or .parquet")
        if not path.is_file():
            raise InputError(f"{name}: {path} does not exist: want a file of documents")


def read(
    name: str, config: DataConfig, folder: Path, seed: int, calibration: bool = False
) -> dict[str, list[Document]]:
    """The documents of each split, in a fixed order that has nothing to do with what they are about, so that the first
    of them can stand for all. `calibration` adds a split of that name. The demonstration corpus is first built in
    folder/corpus."""
    if config.demonstration:
        corpus = folder / "corpus"
        shutil.rmtree(corpus, ignore_errors=True)
        demonstration.build(
            config.demonstration, corpus, seed=seed, max_characters=config.max_characters, tables=("documents",)
        )
        train = list(documents(corpus / "documents.train.jsonl"))
        held_out = list(documents(corpus / "documents.eval.jsonl"))
    elif config.noise_documents:
        train, held_out = _split(_noise(config.noise_documents, seed), "eval", config.held_out_share)
    else:
        train = [row for path in config.documents for row in documents(path)]
        if config.held_out:
            held_out = [row for path in config.held_out for row in documents(path)]
        else:
            train, held_out = _split(train, "eval", config.held_out_share)
    splits = {"train": train, "eval": held_out}
    if calibration:
        splits["train"], splits["calibration"] = _split(train, "calibration", config.held_out_share)
    for split, rows in splits.items():
        if not rows:
            raise InputError(f"{name} has no documents for its {split} split: want at least one; give it more text")
    return {split: sorted(rows, key=lambda row: _position("order", row)) for split, rows in splits.items()}


def pack(splits: dict[str, list[Document]], folder: Path, tokenizer: Tokenizer, special: Special = OWN
         ) -> dict[str, dict]:
    """Write folder/SPLIT for every split; return their manifests."""
    for split in splits:
        shutil.rmtree(folder / split, ignore_errors=True)
    return {split: write(folder / split, rows, tokenizer, special=special) for split, rows in splits.items()}


def documents(path: Path) -> Iterator[Document]:
    """Documents of a JSON-lines or Parquet file. Raises InputError naming file and row where text is missing."""
    for number, row in enumerate(files.rows(path), start=1):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{path} row {number} has no text: want a `text` column that is a non-empty string")
        try:
            text_hash = hashlib.sha256(text.encode()).hexdigest()[:16]
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise InputError(f"{path} row {number} has text that is not Unicode: {error.reason}") from error
        yield Document(text_hash if row.get("id") in (None, "") else str(row["id"]), text)


def _split(rows: list[Document], name: str, share: float) -> tuple[list[Document], list[Document]]:
    """(rest, share) by a hash of the split's name and each document's id, so that a row's side does not depend on the
    other rows, nor on an earlier split."""
    return [r for r in rows if _position(name, r) >= share], [r for r in rows if _position(name, r) < share]


def _position(name: str, row: Document) -> float:
    """A place from 0 to 1 that depends on `name` and the document's id only."""
    return int(hashlib.sha256(f"{name}|{row.id}".encode()).hexdigest()[:8], 16) / 2**32


def _noise(count: int, seed: int) -> list[Document]:
    """Documents of random letters in words: text that carries nothing, for control experiments."""
    rng = random.Random(f"noise|{seed}")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(2000)]
    return [Document(f"noise-{i}", " ".join(rng.choices(words, k=NOISE_WORDS))) for i in range(count)]
