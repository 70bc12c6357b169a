"""lm-eval's `hf` model measures an exported model as our own evaluation measures it."""

import json
import math

import pytest
import torch

from moe.eval.bits import count_bits
from moe.hf import folder as model_folder
from moe.hf.exporting import export_folder
from moe.specialty.merge import merge


def test_bits_of_held_out_text(make_anchor, make_pack, make_documents, packed, tmp_path, monkeypatch):
    """A task of a local file. Each document ends with <|eos|>, which ours predicts, too, and counts no bytes for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="wants the package lm-eval: pip install -e '.[eval]'")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from moe.hf import architecture
    from moe.hf.architecture.modeling_polyclinic import PolyclinicForCausalLM

    architecture.register()
    anchor = make_anchor(context_length=128)
    model = merge(anchor, [make_pack(anchor, owner, slot) for owner, slot in (("billing", 1), ("radiology", 7))])
    model_folder.save(tmp_path / "ours", model)
    export_folder(tmp_path / "ours", tmp_path / "theirs")
    rows = make_documents(12, seed=3)
    want = count_bits(model.decoder, packed(rows), None)

    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps({"text": f"{r.text}<|eos|>"}) + "\n" for r in rows))
    task = {
        "task": "held_out", "dataset_path": "json", "output_type": "loglikelihood_rolling", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "held-out.jsonl")}, "cache_dir": str(tmp_path)},
        "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    lm = HFLM(PolyclinicForCausalLM.from_pretrained(tmp_path / "theirs"), device="cpu", batch_size=3,
              tokenizer=AutoTokenizer.from_pretrained(tmp_path / "theirs"), dtype=torch.float32)
    results = evaluator.simple_evaluate(lm, tasks=[task], bootstrap_iters=0)["results"]["held_out"]
    num_bytes = sum(len(f"{row.text}<|eos|>".encode()) for row in rows)
    assert math.isclose(results["bits_per_byte,none"] * num_bytes, want.total, rel_tol=1e-5)
