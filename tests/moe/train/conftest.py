"""One rank of training in this process, and a job small enough to train in it."""

from pathlib import Path

import pytest
import torch.distributed as dist

from moe.config import BalanceConfig, TrainConfig
from moe.data.loader import Loader, Source
from moe.model import Decoder
from moe.specialty.pack import open_slot
from moe.train.loop import Job
from moe.train.loop import train as train_loop

LENGTH = 16


@pytest.fixture(scope="module")
def process_group(free_port):
    """A process group of one rank, for the tests of one module; environment and DeepSpeed are as before after them."""
    import deepspeed.comm.comm
    from deepspeed.utils import groups

    from moe.train.engine import connect

    known = dict(vars(groups))  # DeepSpeed keeps handles of the process group there
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setattr("moe.train.checkpoint.save.SHARE", 1.0)  # or saves would outlast these short runs
        patch.setattr("moe.train.flops.PROBE_WIDTH", 64)  # the peak's measurement would be most of a test's time
        connect()
        yield
        dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    vars(groups).update(known)


@pytest.fixture
def train_config():
    """A function: a job of six steps, some values changed."""

    def config(**changed) -> TrainConfig:
        plain = dict(
            steps=6, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup_steps=1, weight_decay=0.1,
            evaluate_every=100, checkpoint_every=3,
        )  # fmt: skip
        return TrainConfig(**plain | changed)

    return config


@pytest.fixture
def make_model(model_config, make_anchor):
    """A function: what is trained, `dense` or `pack`; the same weights each time."""

    def model(kind: str = "dense") -> Decoder:
        if kind == "dense":
            return Decoder(model_config(), 280).initialise(5)
        opened = open_slot(make_anchor().decoder, 3)
        for number, layer in enumerate(opened.layers):
            layer.ffn.row.data[number] = 1.0
        return opened

    return model


@pytest.fixture
def text(packed, make_documents):
    return packed(make_documents(60))


@pytest.fixture
def job(tmp_path, train_config):
    """A function: a job in a folder of its own."""

    def made(name: str = "job", precision: str = "float32", deepspeed: dict | None = None, **config) -> Job:
        return Job(
            folder=Path(tmp_path / name),
            identity="the job's inputs",
            config=train_config(**config),
            precision=precision,
            balance=BalanceConfig(),
            seed=1,
            deepspeed=deepspeed or {},
        )

    return made


@pytest.fixture
def train(process_group, text):
    """A function: run a job from its newest checkpoint on; give whether it finished, and its rows."""

    def run(job: Job, model: Decoder, stop_after: int | None = None, held_out=lambda forward: {"held_out_bpb": 1.0}):
        rows = []

        def report(row):
            rows.append(row)
            return row["step"] + 1 == stop_after  # heard in the next step

        loader = Loader(Source(text, LENGTH, 1), job.config.batch_size, job.config.micro_batch_size)
        return train_loop(job, model, loader, held_out, report), rows

    return run
