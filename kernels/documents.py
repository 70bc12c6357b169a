"""Documents: where the documents of a flat batch begin and end, built once per batch.

    documents([0, 3, 5]).position_T == [0, 1, 2, 0, 1]

Needs   boundaries on the host: whoever packed the batch knows them, and attention needs them there.
Errors  ValueError naming the first boundary out of order.
Cost    One copy to the device per batch; every layer of the model then shares the result.
"""

from collections.abc import Sequence

import torch

from kernels.reference import Documents


def documents(boundaries: Sequence[int], device: torch.device | str = "cpu") -> Documents:
    """Documents of T = boundaries[-1] tokens: document b holds tokens boundaries[b]:boundaries[b + 1].

    `[0]` means no tokens. An empty document is refused: it would be a row with nothing to attend to.
    """
    edges = tuple(int(b) for b in boundaries)
    if not edges or edges[0] != 0:
        raise ValueError(f"document boundaries are {list(edges[:3])}: want them to start with 0")
    for b, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        if last <= first:
            raise ValueError(f"document {b} has boundaries {first}:{last}: want at least one token")
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    first_T = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff())
    position_T = torch.arange(edges[-1]) - first_T
    return Documents(edges, cu_seqlens.to(device), position_T.to(device), {})
