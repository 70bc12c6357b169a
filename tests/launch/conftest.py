"""A config that names real files, so that everything that is checked before a run passes."""

import json

import pytest
import yaml

TRAIN = dict(steps=2, batch_size=4, micro_batch_size=2, learning_rate=1e-2, evaluate_every=1, checkpoint_every=1)


@pytest.fixture
def config_file(tmp_path):
    """A whole, right config; its runs go to tmp_path/runs."""
    for name in ("public", "billing"):
        rows = [{"id": f"{name}-{n}", "text": f"{name} text {n}"} for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": {"name": "first", "folder": str(tmp_path / "runs"), "seed": 1, "precision": "float32"},
        "tokenizer": {"vocab_size": 270},
        "model": {
            "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24, "context_length": 16,
        },
        "public": {"documents": [str(tmp_path / "public.jsonl")]},
        "owners": {
            "billing": {"slot": 1, "data": {"documents": [str(tmp_path / "billing.jsonl")]}},
            "radiology": {"slot": 2, "data": {"noise_documents": 20}},
        },
        "anchor": TRAIN,
        "pack": {"train": TRAIN, "replay_share": 0.125},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.dump(values, Dumper=NoAliases))
    return path


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True
