"""lm-eval measures an exported model, through transformers, as our own evaluation measures the model itself."""

import json
import math

import pytest
import torch

from moe.errors import InputError
from moe.eval.bits import count_bits
from moe.hf import folder as model_folder
from moe.hf.exporting import export_folder
from moe.specialty.merge import merge

evaluator = pytest.importorskip("lm_eval.evaluator", reason="wants the package lm-eval: pip install -e '.[eval]'")

STOP = "<|eos|>"


@pytest.fixture
def model(make_anchor, make_pack):
    anchor = make_anchor(context_length=128)
    return merge(anchor, [make_pack(anchor, owner, slot) for owner, slot in (("billing", 1), ("radiology", 7))])


@pytest.fixture
def exported(model, tmp_path):
    """The same, as lm-eval's own `hf` model loads it."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from moe.hf import architecture
    from moe.hf.architecture.modeling_polyclinic import PolyclinicForCausalLM

    architecture.register()
    model_folder.save(tmp_path / "ours", model)
    export_folder(tmp_path / "ours", tmp_path / "theirs")

    def load(**options):
        return HFLM(PolyclinicForCausalLM.from_pretrained(tmp_path / "theirs"), device="cpu", batch_size=3,
                    tokenizer=AutoTokenizer.from_pretrained(tmp_path / "theirs"), dtype=torch.float32, **options)

    return load


@pytest.fixture
def rows(make_documents):
    return make_documents(12, seed=3)


@pytest.fixture
def make_task(rows, tmp_path, monkeypatch):
    """A task of a local file: the rows' texts, and of each its words."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = [{"text": row.text + STOP, "begin": row.text[: 20 + 7 * number], "choices": row.text.split()[:3],
              "answer": number % 3} for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def made(output_type, **others):
        files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)}
        return {"task": output_type, "dataset_path": "json", "output_type": output_type, "test_split": "test",
                "dataset_kwargs": files, "doc_to_text": "{{begin}}", **others}  # fmt: skip

    return made


TASKS = {
    "multiple_choice": {"doc_to_choice": "choices", "doc_to_target": "answer",
                        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "loglikelihood": {"doc_to_target": "{{text[:30]}}", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
    "generate_until": {"doc_to_target": "{{choices[0]}}", "metric_list": [{"metric": "exact_match"}],
                       "generation_kwargs": {"until": ["e"], "max_gen_toks": 24}},
}  # fmt: skip


def answers(lm, task):
    """lm-eval's metrics, and what they were computed from: each request's answer."""
    found = evaluator.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, log_samples=True)
    name = task["task"]
    return found["results"][name], [sample["resps"] for sample in found["samples"][name]]


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_gives_the_same_numbers(kind, model, exported, make_task):
    from moe.eval.harness import HarnessModel

    task = make_task(kind, **TASKS[kind])
    ours, our_answers = answers(HarnessModel(model), task)
    theirs, their_answers = answers(exported(), task)
    if kind == "generate_until":
        assert our_answers == their_answers
        assert len({str(answer) for answer in our_answers}) > 1  # not all of them empty
    else:
        flat = [[number for answer in answers for pair in answer for number in pair[0]]
                for answers in (our_answers, their_answers)]
        assert flat[0] == pytest.approx(flat[1], abs=1e-4) and len(set(flat[0])) > 12
    metrics = [name for name, value in theirs.items() if isinstance(value, float)]
    assert metrics and all(ours[name] == pytest.approx(theirs[name], rel=1e-5) for name in metrics)


def test_an_answer_that_is_longer_than_the_context_is_refused(model, make_task):
    """Not scored with the words of another question."""
    from moe.eval.harness import HarnessModel

    task = make_task("loglikelihood", doc_to_target="{{'ab ' * 100}}", metric_list=[{"metric": "acc"}])
    with pytest.raises(InputError, match="an answer of .* tokens: want at most model.context_length=128"):
        answers(HarnessModel(model), task)


def test_bits_of_held_out_text(model, exported, make_task, packed, rows):
    """Each document ends with <|eos|>, which ours predicts, too, and counts no bytes for."""
    from moe.eval.harness import HarnessModel

    want = count_bits(model.decoder, packed(rows), None).total
    task = make_task("loglikelihood_rolling", doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}])
    task["doc_to_text"] = ""
    num_bytes = sum(len(f"{row.text}{STOP}".encode()) for row in rows)
    for lm in (exported(add_bos_token=False), HarnessModel(model)):
        results, _ = answers(lm, task)
        assert math.isclose(results["bits_per_byte,none"] * num_bytes, want, rel_tol=1e-5)
