"""A job's text on every rank: who hashes it for long is heard, and a damaged shard is named with the mend."""

import sys

import pytest
import torch
import torch.distributed as dist

from moe.data import shards
from moe.data.tokenizer import identity
from moe.errors import InputError
from moe.job import text
from moe.run_folder import RunFolder

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, tokenizer, make_documents):
    """The run's folder with one domain's text, in a process group of one rank."""
    found = RunFolder(tmp_path / "run")
    shards.write(found.shards("first", "train"), make_documents(20), tokenizer)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield found
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is seen to move elsewhere")
def test_a_watchdog_hears_of_it_while_it_lasts(run, tokenizer, monkeypatch):
    """Or one that waits for less time than the hashing takes would end every start."""
    beats, opened = [], text.PackedDocuments
    monkeypatch.setattr("moe.train.together.SLICE_SECONDS", 0.05)

    def slow(*arguments):
        rounds = iter(range(10**6))  # seconds, if nothing is heard
        while len(beats) < 2 and next(rounds, None) is not None:
            sum(range(1000))
        return opened(*arguments)

    monkeypatch.setattr(text, "PackedDocuments", slow)
    found = text.open_split(run, ["first"], "train", identity(tokenizer), CPU, beats.append)
    assert len(found["first"]) == 20 and beats[:2] == ["text"] * 2


def test_a_damaged_shard_is_named_with_the_mend(run, tokenizer):
    path = run.shards("first", "train") / "00000.tokens.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="00000.tokens.npy is damaged: .* delete .*data-first/DONE, and with --resume"):
        text.open_split(run, ["first"], "train", identity(tokenizer), CPU, lambda phase: None)
