"""Rows of JSON-lines and Parquet files, read and written one after another, so that a file may be larger than memory.

    rows(path)                  plain values, in the file's order
    num_rows(path)              how many these are, without parsing them
    types(paths, columns)       of columns of Parquet files, for the writer of another one
    with writer(path, columns, types) as write: write(row)

Errors  InputError naming the file, and the row where it is one that cannot be read. Libraries put values of a row into
        their messages: no error has such a one in it, nor as its cause.
Cost    Reading Parquet holds 1,024 rows at a time, writing it 10,000.
"""

import contextlib
import datetime
import decimal
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow
from pyarrow import ArrowException, parquet
from pyarrow.types import is_date, is_decimal, is_dictionary, is_null, is_timestamp

from moe import manifest as manifests
from moe.errors import InputError

ENDINGS = (".jsonl", ".parquet")
ROWS_READ, ROWS_WRITTEN = 1024, 10_000
UNFIT = (ArrowException, ValueError, TypeError, OverflowError)  # what pyarrow raises of a value

Write = Callable[[dict], None]


def rows(path: Path) -> Iterator[object]:
    """Every row as it is, which a line of JSON may make something else than a dict."""
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def num_rows(path: Path) -> int:
    count, last = 0, b"\n"
    with readable(path), path.open("rb") as file:
        if path.suffix == ".parquet":
            return parquet.ParquetFile(file).metadata.num_rows
        while piece := file.read(2**20):
            count, last = count + piece.count(b"\n"), piece[-1:]
    return count + (last != b"\n")  # the last line may lack its end


def types(paths: Sequence[Path], columns: Sequence[str]) -> dict[str, pyarrow.DataType]:
    """Of those of `columns` that any of these Parquet files has with values."""
    found: dict[str, pyarrow.DataType] = {}
    for path in paths:
        with readable(path), path.open("rb") as file:
            fields = {field.name: field.type for field in parquet.ParquetFile(file).schema_arrow}
        for name in columns:
            kind = fields.get(name, pyarrow.null())
            kind = kind.value_type if is_dictionary(kind) else kind
            if not is_null(kind):
                found[name] = _common(path, name, found.get(name, kind), kind)
    return found


@contextlib.contextmanager
def writer(path: Path, columns: Sequence[str], types: Mapping[str, pyarrow.DataType] | None = None) -> Iterator[Write]:
    """A function that adds a row, which has some of `columns` and no other. The same rows give the same bytes; keys of
    a line of JSON are sorted; a column of Parquet that is not in `types` is text, and one of dates, timestamps or
    decimals takes its values as `line` spells them."""
    with _parquet_writer(path, columns, types or {}) if path.suffix == ".parquet" else _json_writer(path) as write:
        yield write


def line(row: object) -> bytes:
    """A row as JSON lines have it, dates and decimals as text. Raises TypeError for what JSON cannot say,
    RecursionError for what is nested too deeply and UnicodeEncodeError for half of a surrogate pair."""
    return (json.dumps(row, ensure_ascii=False, sort_keys=True, default=_spelled) + "\n").encode()


def key(row: Mapping[str, object]) -> str | None:
    """Its id as text that can be written, which not all is that JSON spells; None where it has none."""
    return None if row.get("id") in (None, "") else str(row["id"]).encode(errors="replace").decode()


def sha256(path: Path) -> str:
    with readable(path):
        return manifests.file_hash(path)


@contextlib.contextmanager
def readable(path: Path, where: str = "") -> Iterator[None]:
    """Around what reads a file: raises InputError with its name where that cannot be done."""
    try:
        yield
    except (OSError, ArrowException) as error:
        known = error.strerror if isinstance(error, OSError) else None  # of what pyarrow finds there is none
        said = known or ("it is damaged" if where else "it is no Parquet file, or damaged")
        raise InputError(f"{path}{where} cannot be read: {said}") from None


def _spelled(value: object) -> str:
    if isinstance(value, datetime.date):  # a datetime is one
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(type(value).__name__)


def _json_rows(path: Path) -> Iterator[object]:
    with readable(path), path.open("rb") as lines:
        for number, each in enumerate(lines, start=1):
            try:
                yield json.loads(each)
                continue
            except (json.JSONDecodeError, UnicodeDecodeError):
                said = "is not JSON in UTF-8: want one object a line"
            except ValueError:
                said = "has a number of too many digits: want at most 4,300"
            except RecursionError:
                said = "is nested too deeply: want one plain object a line"
            raise InputError(f"{path} row {number} {said}")


def _parquet_rows(path: Path) -> Iterator[object]:
    with readable(path), path.open("rb") as raw, parquet.ParquetFile(raw) as file:
        batches, before = file.iter_batches(ROWS_READ), 0
        while True:
            with readable(path, f" from row {before + 1} on"):
                batch = next(batches, None)
            if batch is None:
                return
            yield from _values(path, batch, before)
            before += batch.num_rows


def _values(path: Path, batch: pyarrow.RecordBatch, before: int) -> list[dict]:
    with contextlib.suppress(*UNFIT):
        return batch.to_pylist()
    for number in range(batch.num_rows):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if not _does(column[number].as_py):
                raise InputError(f"{path} row {before + number + 1} has in the column {name} no {column.type} that can "
                                 "be read: want text in UTF-8, and dates between the years 1 and 9999")
    raise InputError(f"{path} cannot be read from row {before + 1} on: it is damaged")


def _does(function: Callable, *arguments: object) -> bool:
    """Whether it raises nothing."""
    try:
        function(*arguments)
    except UNFIT:
        return False
    return True


def _common(path: Path, name: str, one: pyarrow.DataType, other: pyarrow.DataType) -> pyarrow.DataType:
    """A type for the values of both."""
    with contextlib.suppress(ArrowException):
        schemas = [pyarrow.schema([(name, kind)]) for kind in (one, other)]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    raise InputError(f"the column {name} is {other} in {path} and {one} in another file: want one type, or JSON lines "
                     "as one of the inputs")


@contextlib.contextmanager
def _json_writer(path: Path) -> Iterator[Write]:
    with path.open("wb") as file:
        yield lambda row: file.write(line(row))


@contextlib.contextmanager
def _parquet_writer(path: Path, columns: Sequence[str], types: Mapping[str, pyarrow.DataType]) -> Iterator[Write]:
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in columns])
    waiting: list[dict] = []

    def flush() -> None:
        arrays = [_array(field, [row.get(field.name) for row in waiting]) for field in schema]
        file.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
        waiting.clear()

    def write(row: dict) -> None:
        waiting.append(row)
        if len(waiting) == ROWS_WRITTEN:
            flush()

    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        yield write
        if waiting:
            flush()


def _array(field: pyarrow.Field, values: list[object]) -> pyarrow.Array:
    with contextlib.suppress(*UNFIT):
        return _converted(field.type, values)
    wrong = next((value for value in values if not _does(_converted, field.type, [value])), None)
    raise InputError(f"the column {field.name} is {field.type} and has a value of type {type(wrong).__name__}: want "
                     "one type of value in a column, or JSON lines as one of the inputs")


def _converted(kind: pyarrow.DataType, values: list[object]) -> pyarrow.Array:
    if is_date(kind) or is_timestamp(kind) or is_decimal(kind):
        return pyarrow.array(values, pyarrow.string()).cast(kind)
    return pyarrow.array(values, kind)
