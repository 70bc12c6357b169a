"""The loop: what it records, when it evaluates and saves, how it stops, and what it refuses to go on from."""

import json
import math

import pytest
import torch

from moe.data.loader import Loader, Source
from moe.train import checkpoint, loop
from moe.train.finite import NotFinite
from moe.train.objective import LossParts
from moe.train.telemetry import read


def saved(job):
    return sorted(path.name for path in (job.folder / "checkpoints").glob("step-*"))


def test_rows_and_checkpoints_come_when_they_should(train, make_model, job):
    made = job(evaluate_every=4, checkpoint_every=2, steps=5)
    finished, rows = train(made, make_model(), held_out=lambda forward: {"held_out_bpb": 2.5})
    assert finished and [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row.get("held_out_bpb") for row in rows] == [None, None, None, 2.5, 2.5]  # every 4th, and the last
    assert saved(made) == ["step-00000004", "step-00000005"]
    assert read(made.folder / "metrics.jsonl") == rows
    assert all(row["tokens_per_s"] > 0 and row["mfu"] > 0 and row["peak_memory_bytes"] > 1e6 for row in rows)


def test_it_learns(train, make_model, job):
    _, rows = train(job(steps=12), make_model())
    assert rows[0]["loss"] == pytest.approx(math.log(280), rel=0.01)  # small weights know nothing
    assert rows[-1]["loss"] < rows[0]["loss"] - 1


def test_the_loss_of_a_row_is_the_mean_over_its_labels(train, make_model, job, text):
    _, rows = train(job(steps=1), make_model())
    model = make_model()
    batches = list(Loader(Source(text, 16, 1), 4, 2).micro_batches())
    with torch.no_grad():
        nll = sum(model.nll(model(b.token_T, b.documents).hidden_TD, b.label_T).double().sum().item() for b in batches)
    labels = sum((b.label_T != -100).sum().item() for b in batches)
    assert rows[0]["loss"] == pytest.approx(nll / labels, rel=1e-6)


@pytest.mark.parametrize("kind", ["dense", "pack"])
def test_the_cut_into_micro_batches_changes_roundings_only(train, make_model, job, kind):
    (_, one), (_, two) = (
        train(job(f"micro-{size}", micro_batch_size=size, steps=3), make_model(kind)) for size in (1, 4)
    )
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", ["dense", "pack"])
def test_layers_computed_again_change_no_bit(train, make_model, job, kind):
    """Dropout included, which is drawn anew from its counters."""
    rows = {}
    for recompute in (False, True):
        made = job(f"recompute-{recompute}", recompute_layers=recompute, attention_dropout=0.1, steps=3)
        _, rows[recompute] = train(made, make_model(kind))
    for a, b in zip(rows[False], rows[True], strict=True):
        assert (a["loss"], a["gradient_norm"]) == (b["loss"], b["gradient_norm"])


def test_dropout_goes_on_as_it_was_after_a_stop(train, make_model, job):
    """And is not that of the update before: a run stopped half-way ends with the bits of one that was not."""
    ways = {}
    for stop_after in (None, 2):
        made, model = job(f"stop-{stop_after}", attention_dropout=0.3, steps=5), make_model()
        if stop_after:
            train(made, model, stop_after)
        train(made, model)
        ways[stop_after] = model
    assert all(map(torch.equal, ways[None].parameters(), ways[2].parameters()))
    _, without = train(job("without", steps=5), make_model())
    _, rows = train(job("with", attention_dropout=0.3, steps=5), make_model())
    assert all(a["loss"] != b["loss"] for a, b in zip(rows, without, strict=True))


def test_a_stop_is_heard_saved_and_gone_on_from(train, make_model, job):
    made = job(checkpoint_every=100)
    finished, rows = train(made, make_model(), stop_after=2)
    assert not finished and len(rows) == 2 and saved(made) == ["step-00000002"]
    finished, rows = train(made, make_model())
    assert finished and [row["step"] for row in rows] == [3, 4, 5, 6]
    assert [row["step"] for row in read(made.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_does_the_steps_since_its_checkpoint_again(train, make_model, job, monkeypatch):
    made = job()
    poll = checkpoint.Saver.poll

    def at_once(saver):  # these short updates would be through before a save is
        while saver.pending:
            saver._pending.work.exception()
            poll(saver)

    monkeypatch.setattr(checkpoint.Saver, "poll", at_once)

    def killed(forward):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(made, make_model(), held_out=killed)  # in the last step, after its update
    assert saved(made) == ["step-00000003"]
    assert [row["step"] for row in read(made.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    finished, rows = train(made, make_model())
    assert finished and [row["step"] for row in rows] == [4, 5, 6]
    assert [row["step"] for row in read(made.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_finished_job_is_not_trained_again(train, make_model, job):
    made, trained, again = job(), make_model(), make_model()
    train(made, trained)
    assert train(made, again) == (True, [])
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("most", [0, 1])
def test_a_loss_that_is_no_number_names_its_documents(train, make_model, job, text, most):
    """In the third update: the documents of its first micro-batch, and no others. One too many ends the job."""
    made, model = job(checkpoint_every=1, max_skipped=most), make_model()
    batches = list(_batches(text, 3))
    guilty = batches[-2]  # two micro-batches an update

    def poisoned(output, batch, balance):
        loss = _next_token(output, batch, balance)
        if torch.equal(batch.token_T, guilty.token_T):
            return LossParts(loss.total * torch.nan, loss.nll_sum, loss.num_labels, loss.z_loss)
        return loss

    _next_token = loop.next_token
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "next_token", poisoned)
        if most:
            assert train(made, model)[0]
        else:
            with pytest.raises(NotFinite, match="update 3 had a loss or gradient that is no number"):
                train(made, model)
            assert saved(made) == ["step-00000001", "step-00000002"]
    named = json.loads((made.folder / "not-finite-rank-0.jsonl").read_text())
    assert named == {"update": 3, "loss_is_finite": False, "documents": guilty.document_ids()}
    row = read(made.folder / "metrics.jsonl")[2]
    assert math.isnan(row["gradient_norm"]) and "NaN" not in (made.folder / "metrics.jsonl").read_text()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.fixture
def bad_gradient(monkeypatch):
    """A function: give the loss of this micro-batch, counted from 1, a slope that is no number; it stays as it is."""

    def at(number: int) -> None:
        next_token, calls = loop.next_token, []

        def poisoned(output, batch, balance):
            loss = next_token(output, batch, balance)
            calls.append(batch)
            if len(calls) != number:
                return loss
            nothing = (output.hidden_TD.float().sum() * 0).sqrt()  # 0, with an infinite slope
            return LossParts(loss.total + nothing, loss.nll_sum, loss.num_labels, loss.z_loss)

        monkeypatch.setattr(loop, "next_token", poisoned)

    return at


@pytest.mark.parametrize("zero_stage, precision", [(1, "float32"), (1, "bfloat16"), (2, "bfloat16")])
@pytest.mark.parametrize("micro_batch", [3, 4], ids=["before-the-last-micro-batch", "in-the-last-micro-batch"])
def test_an_update_whose_gradient_is_no_number_is_skipped(
    train, make_model, job, bad_gradient, zero_stage, precision, micro_batch
):  # fmt: skip
    bad_gradient(micro_batch)
    model = make_model()
    _, rows = train(job(precision=precision, zero_stage=zero_stage), model)
    assert [not math.isfinite(row["gradient_norm"]) for row in rows] == [False, True] + [False] * 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_after_a_skipped_update_a_run_continued_is_the_run_in_bits(train, make_model, job, bad_gradient):
    """An update that was not made counts neither in Adam's correction nor twice in the schedule."""
    whole, halves = make_model(), make_model()
    bad_gradient(3)
    _, unbroken = train(job("whole"), whole)
    bad_gradient(3)
    train(job("halves"), make_model(), stop_after=3)
    _, continued = train(job("halves"), halves)
    assert [row["learning_rate"] for row in continued] == [row["learning_rate"] for row in unbroken[3:]]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def _batches(text, updates):
    loader = Loader(Source(text, 16, 1), 4, 2)
    for _ in range(updates):
        yield from loader.micro_batches()
