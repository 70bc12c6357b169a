"""What a file or a folder of text is: counts, lengths, duplicates, licences, and whether its files are what its
manifest says. Numbers and names of licences only; no text.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe import manifest as manifests
from moe.data import files, shards
from moe.data import tokenizer as tokenizers
from moe.errors import InputError

MANIFEST, CHANGES = "manifest.json", "changes.jsonl"  # the second is curation's account, whose rows have no text
TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected")
QUANTILES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}
ROWS_AT_ONCE = 256  # that are tokenized together

Tell = Callable[[int, int], None]  # rows looked at, of how many


def inspect(path: Path, tokenizer: Path | None = None, tell: Tell = lambda done, total: None) -> dict[str, Any]:
    """Plain values: of each file its counts, and `damages`, sentences of files that are not what the manifest says.
    Raises InputError where there is nothing to look at."""
    if path.is_file():
        paths, known = [path], {}
    elif (path / MANIFEST).is_file() and "shards" in (values := _manifest(path)):
        return _shards(path, values)
    elif path.is_dir():
        paths = sorted(file for ending in files.ENDINGS for file in path.rglob(f"*{ending}"))
        known = _known(path)
    else:
        raise InputError(f"{path} does not exist: want a file of rows, or a folder of them")
    if wrong := [file for file in paths if file.suffix not in files.ENDINGS]:
        raise InputError(f"{wrong[0]} has the ending {wrong[0].suffix!r}: want .jsonl or .parquet")
    if not paths and not known:
        raise InputError(f"{path} has no rows: want files that end in .jsonl or .parquet, or packed shards")
    encode = _counter(tokenizer)
    damages = {file: sentence for file, digest in known.items() if (sentence := _damage(path, file, digest))}
    paths = [file for file in paths if file.name != CHANGES and
             (file == path or file.relative_to(path).as_posix() not in damages)]
    total, before, found = sum(files.num_rows(file) for file in paths), 0, {}
    for file in paths:
        seen = before
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        found[name] = _rows(file, encode, lambda done, seen=seen: tell(seen + done, total))
        before += files.num_rows(file)
    return {"path": str(path), "kind": "rows", "files": found, "verified": len(known) - len(damages),
            "damages": list(damages.values())}


def _rows(path: Path, encode: Callable[[Sequence[str]], list[int]] | None, tell: Callable[[int], None]
          ) -> dict[str, Any]:
    characters, num_bytes, empty, tokens = 0, 0, 0, 0
    lengths: list[int] = []
    seen: Counter[bytes] = Counter()
    licences: dict[tuple[str, str], None] = {}
    waiting: list[str] = []
    for number, row in enumerate(files.rows(path), start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path} row {number} is no object: want one with a `text`")
        text = "\n".join(row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str))
        raw = text.encode(errors="surrogatepass")
        empty += not text.strip()
        characters, num_bytes = characters + len(text), num_bytes + len(raw)
        lengths.append(len(text))
        seen[hashlib.blake2b(raw, digest_size=12).digest()] += 1
        if "licence" in row or "source" in row:
            licences[str(row.get("licence", "not stated")), str(row.get("source", "not stated"))] = None
        if encode:
            waiting.append(text)
            if len(waiting) == ROWS_AT_ONCE:
                tokens, waiting = tokens + sum(encode(waiting)), []
        tell(number)
    if encode and waiting:
        tokens += sum(encode(waiting))
    counts = {"rows": len(lengths), "characters": characters, "bytes": num_bytes, "empty": empty,
              "exact_duplicates": len(lengths) - len(seen)}
    return counts | ({"tokens": tokens} if encode else {}) | {
        "length_quantiles": _quantiles(np.array(lengths)), "licences": sorted(licences)}


def _shards(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Of a folder of packed shards, whose every file is hashed; lengths are in tokens."""
    counts = {key: values[key] for key in ("documents", "tokens", "bytes", "shards", "vocab_size")}
    damages, lengths = [], np.array([], int)
    try:
        lengths = shards.PackedDocuments(path).lengths
    except InputError as error:
        damages.append(str(error))
    own = counts | {"length_quantiles": _quantiles(lengths), "licences": []}
    return {"path": str(path), "kind": "packed", "files": {path.name: own},
            "verified": 0 if damages else len(values["files"]), "damages": damages}


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    return {name: int(np.quantile(lengths, share, method="nearest")) for name, share in QUANTILES.items()}


def _counter(path: Path | None) -> Callable[[Sequence[str]], list[int]] | None:
    """A function that counts the tokens of texts."""
    if path is None:
        return None
    made = tokenizers.load(path / "tokenizer.json" if path.is_dir() else path)
    return lambda texts: [len(each.ids) for each in made.encode_batch(list(texts), add_special_tokens=False)]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _known(folder: Path) -> dict[str, str]:
    """SHA-256 by file, of all manifests in a folder."""
    found = {}
    for path in sorted(folder.rglob(MANIFEST)):
        listed = _manifest(path.parent).get("files", {})
        for name, about in listed.items():
            found[(path.parent / name).relative_to(folder).as_posix()] = about["sha256"]
    return found


def _damage(folder: Path, file: str, digest: str) -> str:
    path = folder / file
    if not path.is_file():
        return f"{file} is missing"
    return "" if manifests.file_hash(path) == digest else f"{file}: its contents do not match the manifest's sha256"
