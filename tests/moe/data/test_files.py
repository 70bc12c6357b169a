"""Files of rows: what is written comes back, in more rows than are held at once; what cannot be read is named by file
and row; and no error has anything of a row in it, nor as its cause."""

import datetime
import decimal
import traceback

import pyarrow
import pytest
from pyarrow import parquet

from moe.data import files
from moe.errors import InputError

SECRET = "Olga Haddad MRN 990"


def refused(function, *arguments):
    """What is said: of all that a traceback shows, nothing may be of a row."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    shown = "".join(traceback.format_exception(caught.value))
    assert "Haddad" not in shown and "990" not in shown
    return str(caught.value)


def read(path):
    return list(files.rows(path))


@pytest.fixture
def table(tmp_path):
    """A function: a Parquet file of these columns."""

    def write(name="rows.parquet", **columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("ending", files.ENDINGS)
@pytest.mark.parametrize("count", [0, 1, files.ROWS_WRITTEN, 2 * files.ROWS_WRITTEN + 5])
def test_what_is_written_comes_back(tmp_path, ending, count):
    path = tmp_path / f"rows{ending}"
    with files.writer(path, ("id", "text")) as write:
        for n in range(count):
            write({"id": str(n), "text": f"naïve {n}\u2028\u0085\n"})
    assert files.num_rows(path) == count
    assert all(row == {"id": str(n), "text": f"naïve {n}\u2028\u0085\n"} for n, row in enumerate(read(path)))
    assert sum(1 for _ in files.rows(path)) == count


def test_a_column_has_the_type_of_the_inputs_though_its_first_rows_have_no_value(tmp_path, table):
    """Rows are written 10,000 at a time, and the type is that of the first of them."""
    late = [None] * files.ROWS_WRITTEN + [93]
    path = table(age=pyarrow.array(late, pyarrow.int32()))
    with files.writer(tmp_path / "out.parquet", ("id", "age"), files.types([path], ("age",))) as write:
        for age in late:
            write({"id": "x"} | ({} if age is None else {"age": age}))
    assert read(tmp_path / "out.parquet")[-1] == {"id": "x", "age": 93}
    assert parquet.read_schema(tmp_path / "out.parquet").field("age").type == pyarrow.int32()


def test_a_type_is_one_for_all_inputs_or_refused(table):
    small, large = (table(f"{kind}.parquet", x=pyarrow.array([1], kind)) for kind in (pyarrow.int32(), pyarrow.int64()))
    absent, text = table("absent.parquet", x=pyarrow.nulls(1)), table("text.parquet", x=[SECRET])
    kinds = table("kinds.parquet", x=pyarrow.array(["a"]).dictionary_encode())
    assert files.types([small, absent, large], ("x", "y")) == {"x": pyarrow.int64()}
    assert files.types([absent], ("x",)) == {} and files.types([kinds], ("x",)) == {"x": pyarrow.string()}
    assert "column x is string in" in refused(files.types, [small, text], ("x",))


def test_dates_and_decimals_survive_json(tmp_path, table):
    values = {"when": datetime.datetime(2021, 3, 14, 10, 0, 0, 5), "day": datetime.date(1948, 6, 7),
              "zone": datetime.datetime(2021, 3, 14, tzinfo=datetime.UTC), "cost": decimal.Decimal("12.50")}
    path = table(**{name: [value] for name, value in values.items()})
    kinds = files.types([path], tuple(values))
    with files.writer(tmp_path / "out.parquet", tuple(values), kinds) as write:
        (tmp_path / "spool.jsonl").write_bytes(files.line(read(path)[0]))
        write(read(tmp_path / "spool.jsonl")[0])
    assert read(tmp_path / "out.parquet") == [values]
    with pytest.raises(TypeError, match="^bytes$"):
        files.line({"scan": SECRET.encode()})


@pytest.mark.parametrize("kind, value, said", [
    (pyarrow.int64(), SECRET, "column x is int64 and has a value of type str"),
    (pyarrow.string(), {SECRET: 1}, "column x is string and has a value of type dict"),
    (pyarrow.int64(), 990 * 2**60, "column x is int64 and has a value of type int"),
    (pyarrow.timestamp("us"), SECRET, "column x is timestamp[us] and has a value of type str"),
    (pyarrow.string(), f"{SECRET}\ud800", "column x is string and has a value of type str"),
], ids=["text", "object", "too-large", "no-date", "half-a-surrogate"])  # fmt: skip
def test_a_value_that_does_not_fit_is_named_by_its_column_and_types(tmp_path, kind, value, said):
    def write():
        with files.writer(tmp_path / "out.parquet", ("x",), {"x": kind}) as put:
            put({"x": None})
            put({"x": value})

    assert said in refused(write)


@pytest.mark.parametrize("line, said", [
    pytest.param(f'{{"text": "{SECRET}'.encode(), "row 2 is not JSON in UTF-8", id="cut-off"),
    pytest.param(f'"{SECRET}'.encode() + b'\xff"', "row 2 is not JSON in UTF-8", id="latin-1"),
    pytest.param(b"[" * 100_000, "row 2 is nested too deeply", id="deep"),
    pytest.param(b"990" * 2_000, "row 2 has a number of too many digits", id="digits"),
])
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n' + line + b"\n")
    assert said in refused(read, path)


def test_text_in_a_parquet_file_that_is_not_utf_8_is_named(tmp_path):
    rows, raw = files.ROWS_READ + 7, SECRET.encode() + b"\xff"
    starts = pyarrow.py_buffer(b"".join((4 * n if n < rows else 4 * (rows - 1) + len(raw)).to_bytes(4, "little")
                                        for n in range(rows + 1)))
    letters = pyarrow.py_buffer(b"fine" * (rows - 1) + raw)
    bad = pyarrow.Array.from_buffers(pyarrow.string(), rows, [None, starts, letters])
    parquet.write_table(pyarrow.table({"id": [str(n) for n in range(rows)], "text": bad}), tmp_path / "rows.parquet")
    said = refused(read, tmp_path / "rows.parquet")
    assert f"rows.parquet row {rows} has in the column text no string that can be read" in said


def test_damage_within_a_parquet_file_is_named(table):
    path = table(text=[SECRET] * 50)
    raw = bytearray(path.read_bytes())
    raw[20:60] = b"\xff" * 40
    path.write_bytes(raw)
    assert "rows.parquet from row 1 on cannot be read: it is damaged" in refused(read, path)


@pytest.mark.parametrize("ending", files.ENDINGS)
@pytest.mark.parametrize("function", [read, files.num_rows], ids=["rows", "num_rows"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, ending, function):
    path = tmp_path / f"rows{ending}"
    assert f"rows{ending} cannot be read: No such file" in refused(function, path)
    path.symlink_to("/proc/self/mem")  # opens, and gives an error when it is read, even to root
    assert f"rows{ending} cannot be read: " in refused(function, path)
    path.unlink()
    path.write_text(SECRET)
    if ending == ".parquet":
        assert "cannot be read: it is no Parquet file, or damaged" in refused(function, path)
