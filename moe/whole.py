"""Folders and files that are there whole or not at all: written under another name beside their place, then renamed."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` at the end, or is gone where something goes wrong. Two who write one
    `out` do not meet: the second to come to its end fails with OSError."""
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """A file in UTF-8, in the place of the one that is there; `mode` as os.open has it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
