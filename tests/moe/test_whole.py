"""Whole or absent: nothing of a folder or a file that could not be written to its end, and what was there stays."""

import os
import stat

import pytest

from moe.whole import whole_or_absent, write_whole


def test_a_folder_is_there_at_the_end(tmp_path):
    with whole_or_absent(tmp_path / "above/out") as partial:
        (partial / "file").write_text("text")
        assert not (tmp_path / "above/out").exists()
    assert [path.name for path in (tmp_path / "above").iterdir()] == ["out"]
    assert (tmp_path / "above/out/file").read_text() == "text"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_a_folder_that_failed(error, tmp_path):
    with pytest.raises(error), whole_or_absent(tmp_path / "out") as partial:
        (partial / "file").write_text("text")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_two_who_write_one_folder_do_not_meet(tmp_path):
    with pytest.raises(OSError), whole_or_absent(tmp_path / "out") as slow:
        (slow / "file").write_text("slow")
        with whole_or_absent(tmp_path / "out") as fast:
            (fast / "file").write_text("fast")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/file").read_text() == "fast"


def test_what_was_there_stays_where_a_file_fails(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_mode_is_what_the_umask_leaves_of_it(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "open", "")
        write_whole(tmp_path / "mine", "", 0o600)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("open", "mine")}
    assert modes == {"open": 0o640, "mine": 0o600}
