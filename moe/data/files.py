"""Rows of JSON-lines and Parquet files, read and written one after another, so that a file may be larger than memory.

    rows(path)          plain values, in the file's order
    num_rows(path)      how many these are, without parsing them
    with writer(path, columns) as write: write(row)

Errors  InputError naming the file, and the row where it is one that cannot be read.
Cost    Reading Parquet holds 1,024 rows at a time, writing it 10,000.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow
from pyarrow import ArrowException, parquet

from moe.errors import InputError

ENDINGS = (".jsonl", ".parquet")
ROWS_READ, ROWS_WRITTEN = 1024, 10_000

Write = Callable[[dict], None]


def rows(path: Path) -> Iterator[object]:
    """Every row as it is, which a line of JSON may make something else than a dict."""
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def num_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        with _readable(path), parquet.ParquetFile(path) as file:
            return file.metadata.num_rows
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while piece := file.read(2**20):
            count, last = count + piece.count(b"\n"), piece[-1:]
    return count + (last != b"\n")  # the last line may lack its end


@contextlib.contextmanager
def writer(path: Path, columns: Sequence[str]) -> Iterator[Write]:
    """A function that adds a row, which has some of `columns` and no other. The same rows give the same bytes; keys of
    a line of JSON are sorted."""
    with _parquet_writer(path, columns) if path.suffix == ".parquet" else _json_writer(path) as write:
        yield write


def line(row: object) -> bytes:
    """A row as JSON lines have it."""
    return (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _json_rows(path: Path) -> Iterator[object]:
    with path.open("rb") as lines:
        for number, each in enumerate(lines, start=1):
            try:
                yield json.loads(each)
            except ValueError as error:  # of JSON or of UTF-8
                raise InputError(f"{path} row {number} is not JSON in UTF-8: want one object a line") from error


def _parquet_rows(path: Path) -> Iterator[object]:
    with _readable(path), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_READ):
            yield from batch.to_pylist()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ArrowException) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error


@contextlib.contextmanager
def _json_writer(path: Path) -> Iterator[Write]:
    with path.open("wb") as file:
        yield lambda row: file.write(line(row))


@contextlib.contextmanager
def _parquet_writer(path: Path, columns: Sequence[str]) -> Iterator[Write]:
    waiting: list[dict] = []
    out: list[parquet.ParquetWriter] = []

    def flush() -> None:
        try:
            if not out:
                schema = _schema(pyarrow.Table.from_pylist(waiting).schema, columns)
                out.append(parquet.ParquetWriter(path, schema, compression="zstd"))
            out[0].write_table(pyarrow.Table.from_pylist(waiting, schema=out[0].schema))
        except ArrowException as error:
            raise InputError(f"rows cannot be written as Parquet: {error}; want one type of value in a column, or JSON "
                             "lines as input") from error
        waiting.clear()

    def write(row: dict) -> None:
        waiting.append(row)
        if len(waiting) == ROWS_WRITTEN:
            flush()

    try:
        yield write
        if waiting or not out:
            flush()
    finally:
        for each in out:
            each.close()


def _schema(found: pyarrow.Schema, columns: Sequence[str]) -> pyarrow.Schema:
    """Of all columns; one that has no value in the first rows is taken for text."""
    types = {field.name: field.type for field in found if not pyarrow.types.is_null(field.type)}
    return pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in columns])
