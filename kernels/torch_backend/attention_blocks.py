"""What attention in PyTorch works on: documents of one length in chunks, blocks of their queries, scores of a block.

    chunk   E entries: a document, padded to a length L, with one of its key heads
    block   queries first:last of all entries against the S keys low:high
    rows    R of a block are (query, head of the group) pairs: q is [E, L * group, C], k [E, L, C]
"""

import functools
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import at_least_float32
from kernels.reference.attention import Options
from kernels.reference.dropout import philox, threshold

# oneDNN compiles code for every shape of a product in half precision, half a millisecond and half a megabyte each: so
# there are few lengths, and few numbers of entries (powers of two).
SHORT = (16, 32)  # lengths below the first step
STEP, LONG_STEP, LONG = 64, 128, 1024  # queries in a block: so many, and so many behind LONG others
BLOCK = 2**20  # scores of a block, if there are so many: what is read and written meanwhile stays in the caches
WORDS = 2**18  # random numbers that are made at a time, for the same reason


class Chunk(NamedTuple):
    """Place l of entry e is P = e * L + l; it holds row token * G + key head of q, k and v."""

    L: int
    row_P: Tensor  # what pads a document holds its first token
    live_N: Tensor | None  # the places that do not pad; None: all
    row_N: Tensor  # their rows
    first_E: Tensor  # the first token of the entry's document
    length_E: Tensor  # its tokens
    head_E: Tensor  # the entry's key head


class Block(NamedTuple):
    first: int
    last: int
    low: int
    high: int


@functools.lru_cache(maxsize=8)  # the layers of a model share one
def plan(boundaries: tuple[int, ...], G: int, group: int, window: int | None, device: torch.device) -> list[Chunk]:
    """Chunks of all documents, the longest first."""
    edges = torch.tensor(boundaries)
    padded_B = _padded(edges.diff())
    chunks = []
    for L in padded_B.unique().tolist()[::-1]:
        which = (padded_B == L).nonzero()[:, 0]
        first_E, length_E = (x[which].repeat_interleave(G) for x in (edges[:-1], edges.diff()))
        head_E = torch.arange(G).repeat(len(which))
        start, most = 0, _entries(L, group, window)
        while start < len(head_E):
            stop = start + min(most, _power_of_2(len(head_E) - start))
            chunks.append(_chunk(L, G, *(x[start:stop] for x in (first_E, length_E, head_E)), device))
            start = stop
    return chunks


def _padded(length_B: Tensor) -> Tensor:
    step_B = torch.where(length_B > LONG, LONG_STEP, STEP)
    for short in reversed(SHORT):
        step_B = torch.where(length_B <= short, short, step_B)
    return (length_B + step_B - 1) // step_B * step_B


def _entries(L: int, group: int, window: int | None) -> int:
    keys = L if window is None else min(L, 2 * window + STEP)
    return _power_of_2(max(1, BLOCK // (min(L, STEP) * group * keys)))


def _power_of_2(n: int) -> int:
    """The largest that is at most n."""
    return 1 << n.bit_length() - 1


def _chunk(L: int, G: int, first_E: Tensor, length_E: Tensor, head_E: Tensor, device: torch.device) -> Chunk:
    place_L = torch.arange(L)
    live_EL = place_L < length_E[:, None]
    row_P = ((first_E[:, None] + place_L * live_EL) * G + head_E[:, None]).flatten()
    live_N = None if live_EL.all() else live_EL.flatten().nonzero()[:, 0]
    row_N = row_P if live_N is None else row_P[live_N]
    return Chunk(L, *(x if x is None else x.to(device) for x in (row_P, live_N, row_N, first_E, length_E, head_E)))


def product(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> Tensor:
    """out = factor a b, for every entry."""
    return out.baddbmm_(a, b, beta=0, alpha=factor)


class Scratch:
    """Room to write into, kept from chunk to chunk: to get memory from the system for each costs more than the sums.

    `wide` is the dtype of sums, `narrow` of what is multiplied: that of the inputs if the hardware has it.
    """

    def __init__(self, x: Tensor):
        self.wide, self.device = at_least_float32(x), x.device
        native = x.device.type != "cpu" or (x.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
                                            and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self.narrow = x.dtype if native else self.wide
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        size, held = math.prod(shape), self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)

    def product(self, a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        """out = factor a b, in out's dtype: what narrow results round off is a product too, and added to wide ones."""
        if self.narrow == out.dtype:
            product(a, b, out, factor)
            return
        rounded = product(a, b, self.take("product", self.narrow, *out.shape), factor)
        out.copy_(rounded)
        rest = rounded.baddbmm_(a, b, beta=-1, alpha=factor)
        out.add_(self.take("rest", self.wide, *out.shape).copy_(rest))


class Work:
    """The q and k of a chunk, and what is computed of its blocks.

    Scores are wide, which takes a second product and four passes over them. Those of a plain softmax are narrow and
    less the top of their row, which no softmax notices: they are rounded least where weights are largest.
    """

    def __init__(self, chunk: Chunk, scratch: Scratch, q_THC: Tensor, k_TGC: Tensor, sink_H: Tensor | None,
                 options: Options):
        self.chunk, self.scratch, self.options = chunk, scratch, options
        plain = options.softcap is None and options.dropout == 0 and sink_H is None
        self.dtype = scratch.narrow if plain else scratch.wide  # of scores
        self.from_top = self.dtype != scratch.wide
        self.G, self.group = k_TGC.shape[1], q_THC.shape[1] // k_TGC.shape[1]
        self.q_ERC, self.k_ELC = self.gathered("q", q_THC), self.gathered("k", k_TGC)
        self.sink_Eg = self.dsink_Eg = None
        if sink_H is not None:
            self.sink_Eg = sink_H.to(scratch.wide).view(self.G, self.group)[chunk.head_E]
            self.dsink_Eg = torch.zeros_like(self.sink_Eg)

    def gathered(self, name: str, x: Tensor) -> Tensor:
        """[T, heads, width] -> [E, L * heads of an entry, width]."""
        rows = x.reshape(x.shape[0] * self.G, -1)
        out = self.scratch.take(name, x.dtype, len(self.chunk.row_P), rows.shape[1])
        torch.index_select(rows, 0, self.chunk.row_P, out=out)
        if x.dtype != self.scratch.narrow:
            out = self.scratch.take(f"{name} narrow", self.scratch.narrow, *out.shape).copy_(out)
        return out.view(len(self.chunk.head_E), -1, x.shape[2])

    def upstream(self, dout_THU: Tensor) -> Tensor:
        """The same of a gradient: what pads has none."""
        dout_ERU = self.gathered("dout", dout_THU)
        if self.chunk.live_N is not None:
            pads_EL = torch.arange(self.chunk.L, device=dout_ERU.device) >= self.chunk.length_E[:, None]
            dout_ERU.view(*pads_EL.shape, -1).masked_fill_(pads_EL[..., None], 0)
        return dout_ERU

    def room(self, name: str, heads: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """For [E, L * heads, width]."""
        shape = len(self.chunk.head_E), self.chunk.L * heads, width
        return self.scratch.take(name, dtype or self.scratch.narrow, *shape)

    def scatter(self, x_ERC: Tensor, out: Tensor) -> None:
        """[E, L * heads of an entry, width] -> the places of these tokens and heads in [T, heads, width]."""
        rows = x_ERC.view(len(self.chunk.row_P), -1)
        if self.chunk.live_N is not None:
            rows = rows.index_select(0, self.chunk.live_N)
        out.view(out.shape[0] * self.G, -1).index_copy_(0, self.chunk.row_N, rows.to(out.dtype))

    def queries(self, x_ERC: Tensor, block: Block) -> Tensor:
        return x_ERC[:, block.first * self.group:block.last * self.group]

    def keys(self, x_ELC: Tensor, block: Block) -> Tensor:
        return x_ELC[:, block.low:block.high]

    def blocks(self) -> Iterator[Block]:
        L, window = self.chunk.L, self.options.window
        for first, last in pairwise((*range(0, min(L, LONG), STEP), *range(LONG, L, LONG_STEP), L)):
            low, high = 0, last if self.options.causal else L
            if window is not None:  # in whole steps, so that there are few shapes
                low = max(0, first - window + 1) // STEP * STEP
                high = min(high, -(-(last + window - 1) // STEP) * STEP)
            yield Block(first, last, low, high)

    def weights(self, block: Block, find_top: bool = False) -> Tensor:
        """p of a block, as it is multiplied with v. Leaves `p_ERS`, `tanh_ERS` and `keep_ERS` for its gradient.

        `find_top`: what stands in `top_ER1` is not known yet, and is left there."""
        q_ERC, k_ESC = self.queries(self.q_ERC, block).contiguous(), self.keys(self.k_ELC, block).contiguous()
        E, R, S = *q_ERC.shape[:2], k_ESC.shape[1]
        scratch, sinks = self.scratch, self.sink_Eg is not None
        scale, softcap = self.options.scale, self.options.softcap
        self.p_ERS = scratch.take("p", self.dtype, E, R, S + sinks)
        z_ERS = self.p_ERS[..., :S]
        if self.from_top:
            top_ER1 = self.queries(self.top_ER1, block)
            if find_top:
                product(q_ERC, k_ESC.mT, z_ERS, scale)
                self._hide(z_ERS, block)
                # Positive floats are in the order of their bits as integers, whose largest is found ten times as fast;
                # any number does for rows in which none is.
                top_ER1.copy_(z_ERS.view(torch.int16).amax(dim=-1, keepdim=True).clamp_(min=0).view(z_ERS.dtype))
            z_ERS.copy_(top_ER1.expand_as(z_ERS)).baddbmm_(q_ERC, k_ESC.mT, beta=-1, alpha=scale)
        elif softcap is None:
            scratch.product(q_ERC, k_ESC.mT, z_ERS, scale)
        else:
            self.tanh_ERS = scratch.take("tanh", self.dtype, E, R, S)
            scratch.product(q_ERC, k_ESC.mT, self.tanh_ERS, scale / softcap)
            torch.mul(self.tanh_ERS.tanh_(), softcap, out=z_ERS)
        self._hide(z_ERS, block)
        if sinks:
            self._by_heads(self.p_ERS)[..., S] = self.sink_Eg[:, None]
        torch.softmax(self.p_ERS, dim=-1, out=self.p_ERS)
        if self.options.dropout == 0:
            return self._narrow("p", z_ERS)
        self.keep_ERS = self._keep(block)
        return self._narrow("p", z_ERS * self.keep_ERS)

    def weights_backward(self, block: Block, dout_ERU: Tensor, v_ESU: Tensor) -> Tensor:
        """dz of the block that `weights` was last called for; adds to `dsink_Eg`."""
        S, scratch = v_ESU.shape[1], self.scratch
        dp_ERS = scratch.take("dp", self.dtype, *self.p_ERS.shape)
        dz_ERS = dp_ERS[..., :S]
        if self.sink_Eg is not None:  # its gradient is a sum of many
            scratch.product(dout_ERU, v_ESU.mT, dz_ERS)
            dp_ERS[..., S] = 0
        elif self.dtype == scratch.narrow:
            product(dout_ERU, v_ESU.mT, dz_ERS)
        else:  # one rounding is no more than that of dz to come
            dz_ERS.copy_(product(dout_ERU, v_ESU.mT, scratch.take("product", scratch.narrow, *dz_ERS.shape)))
        if self.options.dropout > 0:
            dz_ERS.mul_(self.keep_ERS)
        torch.ops.aten._softmax_backward_data.out(dp_ERS, self.p_ERS, -1, dp_ERS.dtype, grad_input=dp_ERS)
        if self.sink_Eg is not None:
            self.dsink_Eg += self._by_heads(dp_ERS)[..., S].sum(dim=1)
        if self.options.softcap is not None:
            torch.ops.aten.tanh_backward.grad_input(dz_ERS, self.tanh_ERS, grad_input=dz_ERS)
        return self._narrow("dz", dz_ERS)

    def add_product(self, a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        out.add_(product(a, b, self.scratch.take("partial", self.scratch.narrow, *out.shape), factor))

    def add_sinks(self, out_Gg: Tensor) -> None:
        """Add the chunk's gradient of the sinks: a product, because a GPU would add entries in any order."""
        heads_GE = torch.arange(self.G, device=out_Gg.device)[:, None] == self.chunk.head_E
        out_Gg += heads_GE.to(out_Gg.dtype) @ self.dsink_Eg

    def _narrow(self, name: str, x: Tensor) -> Tensor:
        if x.dtype == self.scratch.narrow and x.is_contiguous():
            return x
        return self.scratch.take(f"{name} narrow", self.scratch.narrow, *x.shape).copy_(x)

    def _by_heads(self, x_ERS: Tensor) -> Tensor:
        """[E, R, S] -> [E, queries, group, S]."""
        return x_ERS.unflatten(1, (-1, self.group))

    def _hide(self, z_ERS: Tensor, block: Block) -> None:
        """-inf where a query does not see a key."""
        causal, window = self.options.causal, self.options.window
        query, key = (torch.arange(*span, device=z_ERS.device) for span in (block[:2], block[2:]))
        z_EqgS = self._by_heads(z_ERS)
        if window is not None:
            back = query[:, None, None] - key
            z_EqgS.masked_fill_((back >= window) | (back < 0 if causal else back <= -window), -torch.inf)
        elif causal:  # the keys before the block's first query are seen by all
            later = query[:, None, None] < query
            z_EqgS[..., block.first:].masked_fill_(later, -torch.inf)
        if self.chunk.live_N is not None and not causal:
            # What pads sees itself: a softmax of nothing would be NaN.
            pads = (key >= self.chunk.length_E[:, None, None, None]) & (key != query[:, None, None])
            z_EqgS.masked_fill_(pads, -torch.inf)

    def _keep(self, block: Block) -> Tensor:
        """0 where a weight is dropped, else 1 / (1 - dropout)."""
        dropout, device = self.options.dropout, self.scratch.device
        first = self.chunk.first_E[:, None, None, None]
        query, key = (torch.arange(*span, device=device) for span in (block[:2], block[2:]))
        head_Eg = self.chunk.head_E[:, None] * self.group + torch.arange(self.group, device=device)
        keep_EqgS = torch.empty(len(first), len(query), self.group, len(key), dtype=self.scratch.wide, device=device)
        few = max(1, WORDS // keep_EqgS[0].numel())
        for entries in (slice(e, e + few) for e in range(0, len(first), few)):
            words = philox(self.options.seed, first[entries] + key, first[entries] + query[:, None, None],
                           head_Eg[entries, None, :, None])
            torch.mul(words >= threshold(dropout), 1 / (1 - dropout), out=keep_EqgS[entries])
        return keep_EqgS.flatten(1, 2)
