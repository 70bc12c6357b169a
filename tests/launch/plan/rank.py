"""A rank of test_memory.py: what it keeps for a backward, and of the state, and what an update takes at its highest.

    python tests/launch/plan/rank.py CONFIG OUT      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import kernels
from benchmarks.memory import allocations, highest
from moe.config import JobConfig
from moe.config_file import load
from moe.model import Decoder
from moe.parallel import Mesh
from moe.train.engine import Engine, connect

UPDATES = 6  # whose peaks are taken


def main(config_file: Path, out: Path) -> None:
    config = load(config_file)
    connect()
    model = Decoder(config.model, config.tokenizer.vocab_size, mesh=Mesh.of(config.parallel.expert)).initialise(0)
    engine = Engine(model, config.train, "bfloat16", config.deepspeed)
    state = sum(piece.values.numel() * piece.values.element_size() for piece in engine.pieces()
                if not piece.name.endswith(("selection_bias", "load")))  # what balances, of rank 0 only
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {"state": state, "weights": weights, "kept": kept(engine, model, config.model.context_length),
             "update": update(engine, config)}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def kept(engine: Engine, model: Decoder, tokens: int) -> int:
    """Bytes of the storages that a forward keeps for its backward, but for weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes(), tensor  # held, or its place would be given to another
        return tensor

    token_T = torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = engine(token_T, kernels.documents([0, tokens]))
    assert out.hidden_TD.requires_grad
    return sum(size for size, _ in found.values())


def update(engine: Engine, config: JobConfig) -> int:
    """Bytes that an update takes at its highest, of tensors, above what is there before."""
    tokens = config.model.context_length
    token_T = torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(dist.get_rank()))
    documents = kernels.documents([0, tokens])

    def step() -> None:
        for _ in range(config.train.gradient_accumulation(dist.get_world_size())):
            loss = engine(token_T, documents).hidden_TD.float().square().mean()
            engine.backward(loss)

    step()
    found = []
    for _ in range(UPDATES):  # a release that the profiler misses makes a peak higher: the lowest is the one
        gc.collect()
        found.append(highest(allocations(step)))
    return min(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
