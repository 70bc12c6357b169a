"""Where the documents of a flat batch lie."""

from typing import NamedTuple

from torch import Tensor


class Documents(NamedTuple):
    """Built by kernels.documents, once per batch, and shared by all layers."""

    boundaries: tuple[int, ...]  # on the host, B + 1 of them: first 0, last T, strictly ascending
    cu_seqlens: Tensor  # the same, int32 [B + 1] on the device
    position_T: Tensor  # int64: a token's place in its document, from 0
    tables: dict[tuple, Tensor]  # what a backend has made of them, to be used again; lives as long as they do
