"""What a file or a folder of text is: counts, lengths, duplicates, licences, and whether its files are what its
manifest says. Numbers and names of licences only; no text.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.data import files, shards
from moe.data import tokenizer as tokenizers
from moe.errors import InputError

MANIFEST, CHANGES = "manifest.json", "changes.jsonl"  # the second of a curation: its account, whose rows have no text
TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected")
QUANTILES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}
PACKED = ("documents", "tokens", "bytes", "shards", "vocab_size")  # what is told of packed shards
ROWS_AT_ONCE = 256  # that are tokenized together

Tell = Callable[[int, int], None]  # rows looked at, of how many


def inspect(path: Path, tokenizer: Path | None = None, tell: Tell = lambda done, total: None) -> dict[str, Any]:
    """Plain values: of each file its counts, and `damages`, sentences of files that are not what the manifest says.
    Raises InputError where there is nothing to look at."""
    with files.readable(path):
        is_file = path.is_file()
    if is_file:
        paths, known = [path], {}
    elif (path / MANIFEST).is_file() and "shards" in _manifest(path):
        return _shards(path)
    elif path.is_dir():
        paths = sorted(file for ending in files.ENDINGS for file in path.rglob(f"*{ending}")
                       if file.is_file() and not _is_account(file))
        known = _known(path)
    else:
        raise InputError(f"{path} does not exist: want a file of rows, or a folder of them")
    if wrong := [file for file in paths if file.suffix not in files.ENDINGS]:
        raise InputError(f"{wrong[0]} has the ending {wrong[0].suffix!r}: want .jsonl or .parquet")
    if not paths and not known:
        raise InputError(f"{path} has no rows: want files that end in .jsonl or .parquet, or packed shards")
    encode = _counter(tokenizer)
    damages = {file: sentence for file, digest in known.items() if (sentence := _damage(path, file, digest))}
    paths = [file for file in paths if file == path or file.relative_to(path).as_posix() not in damages]
    total, before, found = sum(files.num_rows(file) for file in paths), 0, {}
    for file in paths:
        seen = before
        name = file.name if is_file else file.relative_to(path).as_posix()
        found[name] = _rows(file, encode, lambda done, seen=seen: tell(seen + done, total))
        before += files.num_rows(file)
    return {"path": str(path), "kind": "rows", "files": found, "verified": len(known) - len(damages),
            "damages": list(damages.values())}


def _rows(path: Path, encode: Callable[[Sequence[str]], list[int]] | None, tell: Callable[[int], None]
          ) -> dict[str, Any]:
    characters, num_bytes, empty, not_unicode, tokens = 0, 0, 0, 0, 0
    lengths: list[int] = []
    seen: Counter[bytes] = Counter()
    licences: dict[tuple[str, str], None] = {}
    waiting: list[str] = []
    for number, row in enumerate(files.rows(path), start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path} row {number} is no object: want one with a `text`")
        text = "\n".join(row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str))
        raw = text.encode(errors="surrogatepass")
        written = text.encode(errors="replace").decode()
        not_unicode += written != text  # JSON can spell half of a surrogate pair
        empty += not text.strip()
        characters, num_bytes = characters + len(text), num_bytes + len(raw)
        lengths.append(len(text))
        seen[hashlib.blake2b(raw, digest_size=12).digest()] += 1
        if "licence" in row or "source" in row:
            pair = (str(row.get(column, "not stated")) for column in ("licence", "source"))
            licences[tuple(value.encode(errors="replace").decode() for value in pair)] = None
        if encode:
            waiting.append(written)
            if len(waiting) == ROWS_AT_ONCE:
                tokens, waiting = tokens + sum(encode(waiting)), []
        tell(number)
    if encode and waiting:
        tokens += sum(encode(waiting))
    counts = {"rows": len(lengths), "characters": characters, "bytes": num_bytes, "empty": empty,
              "exact_duplicates": len(lengths) - len(seen), "not_unicode": not_unicode}
    return counts | ({"tokens": tokens} if encode else {}) | {
        "length_quantiles": _quantiles(np.array(lengths)), "licences": sorted(licences)}


def _shards(path: Path) -> dict[str, Any]:
    """Of a folder of packed shards, whose every file is hashed; lengths are in tokens."""
    values, damages, lengths = _manifest(path), [], np.array([], int)
    if absent := [key for key in (*PACKED, "files") if key not in values]:
        raise InputError(f"{path / MANIFEST} tells of shards and has no {absent[0]}: want it as it was written")
    try:
        with files.readable(path):
            lengths = shards.PackedDocuments(path).lengths
    except InputError as error:
        damages.append(str(error))
    own = {key: values[key] for key in PACKED} | {"length_quantiles": _quantiles(lengths), "licences": []}
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
    path, values = folder / MANIFEST, None
    with files.readable(path), contextlib.suppress(ValueError, RecursionError):
        values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object: want it as it was written")
    return values


def _is_account(file: Path) -> bool:
    beside = file.name == CHANGES and file.with_name(MANIFEST).is_file()
    return beside and _manifest(file.parent).get("kind") == "curation"


def _known(folder: Path) -> dict[str, str]:
    """SHA-256 by file, of all manifests in a folder."""
    found = {}
    for path in sorted(file for file in folder.rglob(MANIFEST) if file.is_file()):
        listed = _manifest(path.parent).get("files", {})
        if not isinstance(listed, dict) or not all(map(_is_told, listed.items())):
            raise InputError(f"{path} does not say which files it is of: want a `files` with the sha256 of each by its "
                             "name")
        for name, about in listed.items():
            found[(path.parent / name).relative_to(folder).as_posix()] = about["sha256"]
    return found


def _is_told(file: tuple[str, Any]) -> bool:
    name, about = file
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(about, dict) and isinstance(about.get("sha256"), str)


def _damage(folder: Path, file: str, digest: str) -> str:
    path = folder / file
    if not path.is_file():
        return f"{file} is missing"
    return "" if files.sha256(path) == digest else f"{file}: its contents do not match the manifest's sha256"
