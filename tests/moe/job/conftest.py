"""A small job on the noise of two domains."""

import json

import pytest
import yaml

TRAIN = dict(
    steps=40, batch_size=8, micro_batch_size=2, learning_rate=3e-3, warmup_steps=2, evaluate_every=1000,
    checkpoint_every=1000,
)  # fmt: skip


@pytest.fixture(scope="session")
def make_job(tmp_path_factory):
    """A function: the file of a mixture's config, whose runs go to the folder beside it; sections may be changed."""

    def file(**changed):
        folder = tmp_path_factory.mktemp("job")
        values = {
            "run": {"name": "small", "folder": str(folder / "runs"), "seed": 3, "precision": "float32"},
            "tokenizer": {"vocab_size": 280},
            "model": {
                "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24, "context_length": 32,
                "mixture": {"num_experts": 4, "top_k": 2, "d_ff": 24},
            },
            "domains": {
                "first": {"noise_documents": 60, "held_out_share": 0.2},
                "second": {"noise_documents": 30, "held_out_share": 0.2},
            },
            "train": TRAIN,
            "parallel": {"expert": 2},
            "cluster": {"workers": 2},
        } | changed  # fmt: skip
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))
        return path

    return file
