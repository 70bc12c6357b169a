"""The queue of judgements: nothing is lost, nothing is in it twice, no owner's words are in another's file."""

import json
import multiprocessing
import stat

import pytest

from moe import feedback
from moe.errors import InputError

THUMB = dict(owner="radiology", stakeholder="patient", prompt="What is J90?", answer="Fluid.", thumb="up")
PAIR = dict(owner="billing", stakeholder="payer", prompt="Is it billable?", chosen="J90 is.", rejected="Perhaps.")


def judgement(**changed):
    return feedback.parse(changed, "here")


def test_comes_back_by_owner_and_group(tmp_path):
    assert feedback.add(tmp_path / "queue", [judgement(**THUMB), judgement(**PAIR)]) == (2, 0)
    assert {path.name for path in (tmp_path / "queue").iterdir()} == {"radiology.jsonl", "billing.jsonl"}
    assert "J90 is" not in (tmp_path / "queue/radiology.jsonl").read_text()
    assert [j.prompt for j in feedback.read(tmp_path / "queue", owner="billing")] == ["Is it billable?"]
    assert [j.owner for j in feedback.read(tmp_path / "queue", stakeholder="patient")] == ["radiology"]
    mode = (tmp_path / "queue/billing.jsonl").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_the_same_judgement_is_added_once(tmp_path):
    twice = [judgement(**THUMB), judgement(**THUMB, comment="said again")]
    assert feedback.add(tmp_path, twice) == (1, 1)
    assert feedback.add(tmp_path, [judgement(**THUMB | {"thumb": "down"}), *twice]) == (1, 2)
    assert [j.thumb for j in feedback.read(tmp_path)] == ["up", "down"]


def _fill(folder, writer):
    for number in range(40):
        own = judgement(**THUMB | {"prompt": f"question {number} of {writer}"})
        both = judgement(**THUMB | {"prompt": f"question {number} of both"})
        feedback.add(folder, [own, both])


def test_two_writers_lose_nothing_and_tear_nothing(tmp_path):
    writers = [multiprocessing.get_context("fork").Process(target=_fill, args=(tmp_path, n)) for n in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    said = [j.prompt for j in feedback.read(tmp_path)]
    assert len(said) == len(set(said)) == 120  # what both said stands there once


def test_half_a_line_is_taken_aside(tmp_path):
    feedback.add(tmp_path, [judgement(**THUMB)])
    with (tmp_path / "radiology.jsonl").open("a") as file:
        file.write('{"id": "torn, "prom')
    assert len(list(feedback.read(tmp_path))) == 1
    feedback.add(tmp_path, [judgement(**THUMB | {"thumb": "down"})])
    assert [j.thumb for j in feedback.read(tmp_path)] == ["up", "down"]
    assert (tmp_path / "radiology.torn-1").read_text() == '{"id": "torn, "prom'


def test_rows_for_alignment(tmp_path):
    feedback.add(tmp_path, [judgement(**THUMB), judgement(**PAIR)])
    both = list(feedback.read(tmp_path))
    (pair,) = feedback.as_preferences(both)
    assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["stakeholder"]) == (
        "Is it billable?", "J90 is.", "Perhaps.", "payer")
    assert [(row["completion"], row["label"]) for row in feedback.as_thumbs(both)] == [
        ("J90 is.", True), ("Perhaps.", False), ("Fluid.", True)]


@pytest.mark.parametrize("values, said", [
    (THUMB | {"stakeholder": "nurse"}, "stakeholder: want 'clinician'"),
    (THUMB | {"owner": "Radiology!"}, "owner='Radiology!': want a name"),
    (THUMB | {"prompt": ""}, "prompt: "),
    ({**THUMB, "thumb": None}, "want an answer with a thumb, or a chosen and a rejected"),
    (THUMB | {"chosen": "a", "rejected": "b"}, "want an answer with a thumb, or"),
    (PAIR | {"rejected": "J90 is."}, "chosen and rejected are the same"),
    (THUMB | {"mood": "good"}, "mood: "),
    ("text", "here: "),
])  # fmt: skip
def test_refuses(values, said):
    with pytest.raises(InputError, match=said):
        feedback.parse(values, "here")


def test_a_queue_can_be_added_to_another(tmp_path):
    feedback.add(tmp_path / "one", [judgement(**THUMB), judgement(**PAIR)])
    rows = [json.loads(line) for path in sorted((tmp_path / "one").iterdir()) for line in path.open()]
    assert feedback.add(tmp_path / "two", [feedback.parse(row, "here") for row in rows]) == (2, 0)
    same = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == same
    with pytest.raises(InputError, match=f"here: id={rows[1]['id']!r} is not that of this judgement"):
        feedback.parse(rows[0] | {"id": rows[1]["id"]}, "here")


def test_a_queue_of_somebody_else_is_named(tmp_path):
    (tmp_path / "billing.jsonl").mkdir()
    with pytest.raises(InputError, match="billing.jsonl cannot be read: Is a directory"):
        list(feedback.read(tmp_path))


@pytest.mark.parametrize("line", [{"text": "something else"}, ["id"], {"id": 3}], ids=str)
def test_a_file_that_is_no_queue_is_named(line, tmp_path):
    (tmp_path / "billing.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="billing.jsonl line 1 is none of a queue"):
        list(feedback.read(tmp_path))
    with pytest.raises(InputError, match="billing.jsonl line 1 is none of a queue"):
        feedback.add(tmp_path, [judgement(**PAIR)])
    with pytest.raises(InputError, match="no folder: want a queue"):
        list(feedback.read(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="billing.jsonl is no folder: want a queue"):
        feedback.add(tmp_path / "billing.jsonl", [judgement(**PAIR)])
