"""A job's packed text on every rank, verified by all together: each hashes a part, all hear what one has found."""

import torch
import torch.distributed as dist

from moe.data.shards import PackedDocuments
from moe.errors import InputError
from moe.run_folder import RunFolder


def open_split(run: RunFolder, domains: list[str], split: str, tokenizer_hash: str, device: torch.device
               ) -> dict[str, PackedDocuments]:
    """A split of each domain. Every rank must call it. Raises the same InputError on all where one finds a shard
    damaged."""
    found, said = {}, ""
    try:
        for domain in domains:
            found[domain] = PackedDocuments(run.shards(domain, split), tokenizer_hash, dist.get_rank(),
                                            dist.get_world_size())
    except InputError as error:
        done = run.stage(f"data-{domain}") / "DONE"
        said = f"{error}; want it back, or delete {done}, and with --resume that text is prepared again"
    if said := _first(said, device):
        raise InputError(said)
    return found


def _first(said: str, device: torch.device) -> str:
    """Of what the ranks say, the first that is not empty; by rank."""
    text = said.encode()
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = len(text)
    dist.all_reduce(sizes)
    speakers = sizes.nonzero().flatten().tolist()
    if not speakers:
        return ""
    heard = torch.zeros(int(sizes[speakers[0]]), dtype=torch.uint8, device=device)
    if dist.get_rank() == speakers[0]:
        heard.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(heard, src=speakers[0])
    return bytes(heard.tolist()).decode()
