"""A job's packed text on every rank, verified by all together: each hashes a part, all hear what one has found."""

import torch
import torch.distributed as dist

from moe.data.shards import PackedDocuments
from moe.errors import InputError
from moe.run_folder import RunFolder
from moe.train.together import together
from moe.train.watchdog import Beat


def open_split(run: RunFolder, domains: list[str], split: str, tokenizer_hash: str, device: torch.device, beat: Beat
               ) -> dict[str, PackedDocuments]:
    """A split of each domain. Every rank must call it. Raises the same InputError on all where one finds a shard
    damaged."""
    rank, ranks, found, said = dist.get_rank(), dist.get_world_size(), {}, ""

    def read() -> None:
        for domain in domains:
            try:
                found[domain] = PackedDocuments(run.shards(domain, split), tokenizer_hash, rank, ranks)
            except InputError as error:
                done = run.stage(f"data-{domain}") / "DONE"
                raise InputError(f"{error}; want it back, or delete {done}, and with --resume that text is prepared "
                                 "again") from error

    try:
        together(read, device, beat, "text")
    except InputError as error:
        said = str(error)
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
