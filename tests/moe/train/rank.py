"""One rank of test_ranks.py and test_parity.py: do each task it is given, from the newest checkpoint in its folder on.

    python tests/moe/train/rank.py TASKS.json       with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe.config import BalanceConfig, ModelConfig, TrainConfig
from moe.data.loader import Loader, Source
from moe.data.shards import PackedDocuments
from moe.eval.bits import bits_per_byte
from moe.model import Decoder
from moe.parallel import Mesh
from moe.specialty.pack import open_slot
from moe.train import flops
from moe.train.engine import connect
from moe.train.loop import Job, train


def do(task: dict) -> None:
    config, sizes = TrainConfig(**task["train"]), ModelConfig(**task["model"])
    mesh = Mesh.of(task.get("expert", 1))
    model = Decoder(sizes, task["vocabulary"], mesh=mesh, exchange_chunks=task.get("chunks", 1)).initialise(5)
    for router in model.routers():
        router.table.data.mul_(20)  # clear choices, which roundings do not turn
    if task["kind"] == "pack":
        model = open_slot(model, 3)
        for number, layer in enumerate(model.layers):
            layer.ffn.row.data[number] = 1.0
    text = PackedDocuments(Path(task["text"]))
    loader = Loader(
        Source(text, sizes.context_length, 1),
        config.batch_size,
        config.micro_batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    balance = BalanceConfig(**task.get("balance", {}))
    job = Job(Path(task["folder"]), "id", config, task["precision"], balance, 1, {})
    told_at = task["stop_after"] - 1  # a request is heard in the step after it

    def held_out(forward) -> dict:
        return {"held_out_bpb": bits_per_byte(model, text, None)}

    finished = train(job, model, loader, held_out, lambda row: row["step"] == told_at)
    assert finished == (told_at < 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    flops.PROBE_WIDTH = 64
    connect()
    for task in json.loads(Path(sys.argv[1]).read_text()):
        do(task)
    dist.barrier()
    dist.destroy_process_group()
