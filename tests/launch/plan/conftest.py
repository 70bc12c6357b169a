"""Small configs and clusters that plans are made for."""

import pytest

from launch.plan.cluster import Cluster, Link
from moe.config_file import check

MODEL = dict(d_model=256, num_layers=4, num_heads=4, num_kv_heads=2, d_ff=512, context_length=256)
MIXTURE = dict(num_experts=8, top_k=2, d_ff=128)


@pytest.fixture
def job():
    """A function: a job's config, with changes to its sections."""

    def make(mixture=MIXTURE, parallel=None, workers=8, model=None, cluster=None, deepspeed=None, **train):
        values = dict(steps=100, batch_size=64, micro_batch_size=2, learning_rate=1e-3, evaluate_every=10,
                      checkpoint_every=10)
        return check({
            "run": {"name": "planned", "seed": 1}, "tokenizer": {"vocab_size": 512},
            "model": {**MODEL, "mixture": mixture, **(model or {})}, "domains": {"noise": {"noise_documents": 10}},
            "train": values | train, "parallel": parallel or {}, "cluster": {"workers": workers, **(cluster or {})},
            "deepspeed": deepspeed or {},
        })

    return make


@pytest.fixture
def cluster():
    """A function: a cluster of H100, with changes."""

    def make(**changes):
        values = dict(name="test", device="h100", nodes=1, gpus_per_node=8, node_link=Link(gb_per_s=450.0),
                      network=Link(gb_per_s=50.0), price_per_gpu_hour=2.0)
        return Cluster(**values | changes)

    return make
