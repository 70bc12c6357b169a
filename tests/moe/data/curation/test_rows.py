"""Looking at rows: nothing of an earlier curation is used again, and a process that is gone is missed."""

import multiprocessing
import os
import shutil
import signal

import pytest

from moe.data.curation import rows, workers
from moe.data.curation.contamination import Index, Item
from moe.data.curation.settings import Deidentify, Settings
from moe.errors import InputError

pytest.importorskip("presidio_analyzer", reason="wants the extra curate: pip install -e '.[curate]'")

PLAIN = Settings(deidentify=None, filter=None, deduplicate=None)


def test_an_index_in_the_same_place_is_another_index(tmp_path, sentences):
    texts, folder = [sentences(1), sentences(2)], tmp_path / "index"
    for own in (0, 1):
        folder.mkdir()
        Index.build([Item("exam.jsonl", "1", (texts[own],))], PLAIN.decontaminate)[0].save(folder)
        found = [len(looked.runs) > 0 for looked in rows.look(texts, PLAIN, folder, workers=1)]
        assert found == [own == 0, own == 1]
        shutil.rmtree(folder)


def test_a_key_in_the_same_place_is_another_key(tmp_path):
    said = set()
    for letter in (b"a", b"b"):
        (tmp_path / "key").write_bytes(letter * 16)
        settings = PLAIN.model_copy(update={"deidentify": Deidentify(key=tmp_path / "key")})
        said |= {looked.text for looked in rows.look(["MRN: 00482913"], settings, None, workers=1)}
    assert len(said) == 2


@pytest.fixture
def no_more_processes():
    """When the test is at its end."""
    yield
    for process in multiprocessing.active_children():
        process.join(30)
        assert not process.is_alive()


def test_a_process_that_is_killed_is_missed(sentences, no_more_processes):
    def texts():
        for n in range(10_000):
            if n == 1_000:
                for process in multiprocessing.active_children():
                    os.kill(process.pid, signal.SIGKILL)
            yield sentences(n % 7)

    with pytest.raises(workers.WorkerLost, match="want fewer workers"):
        for _ in rows.look(texts(), PLAIN, None, workers=2):
            pass


def test_what_goes_wrong_as_a_process_begins_is_told(tmp_path, no_more_processes):
    settings = PLAIN.model_copy(update={"deidentify": Deidentify(key=tmp_path / "absent")})
    with pytest.raises(InputError, match="absent cannot be read"):
        list(rows.look(["text"], settings, None, workers=2))
