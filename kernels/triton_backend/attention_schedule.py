"""Which tiles attention works on, longest first, and from where to where each has to look: made by the host.

A tile is BLOCK_M rows of queries or BLOCK_N keys of one document and one key head. A row is a query and a head of the
key head's group: row r of a document is token r // group, head r % group of the group, so that keys are loaded once for
all. Everything is counted from the document's start, so what a tile adds up, and in which order, does not depend on
where its document lies.

A table is int32 [tiles, 7]: the document's first token, its length, the tile's first row (or key), and the edges
begin <= full <= rest <= end of its loop over the other side. From full to rest, in steps of that side's block, all
pairs see each other; before and behind, in steps of `edge`, a mask decides, and that comes first. It is built once for
a batch and shared by the layers of a model.
"""

import torch
from torch import Tensor


def query_tiles(boundaries: tuple[int, ...], group: int, block_m: int, block_n: int, edge: int, causal: bool,
                window: int | None, device: torch.device) -> Tensor:
    first, length, start = _tiles(boundaries, group, block_m)
    lowest = start // group
    highest = torch.minimum(start + block_m, length * group).sub(1) // group
    begin, full = torch.zeros_like(start), torch.zeros_like(start)
    rest, end = length, length
    if window is not None:
        begin, full = lowest - window + 1, highest - window + 1
        rest, end = lowest + window, highest + window
    if causal:
        rest, end = lowest + 1, highest + 1
    return _table(first, length, start, (begin, full, rest, end), length, block_n, edge, device)


def key_tiles(boundaries: tuple[int, ...], group: int, block_m: int, block_n: int, edge: int, causal: bool,
              window: int | None, device: torch.device) -> Tensor:
    first, length, start = _tiles(boundaries, 1, block_n)
    highest = torch.minimum(start + block_n, length) - 1
    begin, full = torch.zeros_like(start), torch.zeros_like(start)
    rest, end = length, length
    if window is not None:
        begin, full = start - window + 1, highest - window + 1
        rest, end = start + window, highest + window
    if causal:
        begin, full = start, highest
    return _table(first, length, start, [group * place for place in (begin, full, rest, end)], group * length, block_m,
                  edge, device)


def _tiles(boundaries: tuple[int, ...], rows: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Document's first token and length, and the first row, of every tile; a document has `rows` rows a token."""
    edges = torch.tensor(boundaries)
    length = edges.diff()
    count = (length * rows + block - 1) // block
    document = torch.repeat_interleave(count)
    start = (torch.arange(document.numel()) - (count.cumsum(0) - count)[document]) * block
    return edges[document], length[document], start


def _table(first: Tensor, length: Tensor, start: Tensor, edges, limit: Tensor, block: int, edge: int,
           device) -> Tensor:
    """`edges` are the exact ones: here they come within 0 to limit and to where a step begins."""
    begin, full, rest, end = (torch.minimum(place.clamp(min=0), limit) for place in edges)
    begin, full = begin // edge * edge, (full + edge - 1) // edge * edge
    rest = full + (rest - full).clamp(min=0) // block * block
    none_full = rest == full
    full, rest = torch.where(none_full, begin, full), torch.where(none_full, begin, rest)
    order = torch.argsort(end - begin, descending=True, stable=True)
    table = torch.stack([first, length, start, begin, full, rest, end], dim=1)[order].int()
    if device.type == "cuda":  # from pinned memory, or the host would wait for what the device still has to do
        return table.pin_memory().to(device, non_blocking=True)
    return table
