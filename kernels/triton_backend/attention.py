"""Attention on the device: one launch forward, two backward; the host makes the tiles, nothing waits for the device.

    forward     attention_forward: out, and lse of every row
    backward    attention_queries: delta and dq;  attention_keys: dk and dv;  then dsink by a sum over tokens

Keys and values come by tensor descriptors where there are bulk copies (BULK) and strides allow them (half precision, a
head of 16-byte multiples), in attention_keys so do q and dout where the group divides a tile; elsewhere, and at the
edges of documents, by pointers.
`launch` gives what each kernel is compiled with: kernels.aot compiles the same.
"""

import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.reference import Documents, dropout
from kernels.reference.attention import Options
from kernels.triton_backend import attention_backward, attention_forward
from kernels.triton_backend.attention_schedule import key_tiles, query_tiles
from kernels.triton_backend.configurations import older
from kernels.triton_backend.launch import architecture, describable, exact, on_its_device

MAX_HEAD_SIZE = 256
BULK = ("interpreter", "sm_90", "sm_100")  # where a descriptor is more than pointers in disguise
LOG2_E = math.log2(math.e)

# (BLOCK_M, BLOCK_N, BLOCK_EDGE, warps, stages) of a kernel in half precision, by the sum of both padded head sizes up
# to which they hold. One entry for all, or behind it others for a soft cap, and for dropout: they need more registers.
# Chosen from compile reports: nothing spills in any variant of kernels.aot. Not timed on a GPU yet.
TILES = {
    "interpreter": {"forward": {512: [(64, 32, 16, 4, 1)]}, "queries": {512: [(64, 32, 16, 4, 1)]},
                    "keys": {512: [(32, 64, 16, 4, 1)]}},
    "sm_80": {  # within the 99 KiB that a program has on sm_86 and sm_89
        "forward": {128: [(128, 64, 64, 8, 3)], 256: [(128, 32, 32, 8, 3)], 384: [(128, 32, 32, 8, 2)],
                    512: [(64, 32, 32, 8, 2)]},
        "queries": {128: [(128, 64, 64, 8, 2)], 256: [(128, 32, 16, 8, 2)], 384: [(64, 32, 32, 8, 2)],
                    512: [(32, 32, 16, 8, 2)]},
        "keys": {128: [(64, 128, 32, 8, 2)], 256: [(64, 64, 32, 8, 2)], 384: [(64, 32, 16, 8, 2)],
                 512: [(32, 32, 16, 8, 2)]},
    },
    "sm_90": {
        "forward": {128: [(128, 128, 64, 8, 3)],
                    256: [(128, 128, 64, 8, 2)],
                    384: [(128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (128, 32, 32, 8, 2)],
                    512: [(128, 32, 32, 8, 2), (128, 32, 32, 8, 2), (64, 32, 32, 8, 2)]},
        "queries": {128: [(128, 128, 64, 8, 2), (128, 128, 64, 8, 2), (128, 64, 64, 8, 2)],
                    256: [(128, 64, 64, 8, 2)],
                    384: [(64, 64, 32, 8, 2)],
                    512: [(64, 64, 32, 8, 2), (64, 32, 32, 8, 2)]},
        "keys": {128: [(64, 128, 64, 8, 2)],
                 256: [(64, 128, 32, 8, 2), (32, 128, 16, 8, 2), (16, 128, 16, 8, 2)],
                 512: [(64, 64, 32, 8, 2), (64, 64, 32, 8, 2), (32, 64, 16, 8, 2)]},
    },
    "sm_100": {
        "forward": {128: [(128, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 32, 32, 8, 2)],
                    256: [(128, 128, 64, 8, 2), (128, 128, 64, 8, 2), (128, 32, 32, 8, 2)],
                    512: [(128, 64, 32, 8, 2), (128, 64, 32, 8, 2), (128, 32, 32, 8, 2)]},
        "queries": {128: [(128, 128, 64, 8, 2), (128, 128, 64, 8, 2), (128, 32, 32, 8, 2)],
                    256: [(128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (128, 32, 32, 8, 2)],
                    512: [(128, 64, 64, 8, 1), (128, 64, 64, 8, 1), (128, 32, 32, 8, 1)]},
        "keys": {128: [(64, 128, 64, 8, 2), (64, 128, 64, 8, 2), (32, 128, 32, 8, 2)],
                 256: [(64, 128, 64, 8, 2), (64, 128, 64, 8, 2), (32, 128, 32, 8, 2)],
                 512: [(64, 64, 32, 8, 2), (64, 64, 32, 8, 2), (32, 128, 32, 8, 2)]},
    },
    "gfx942": {
        "forward": {256: [(128, 64, 64, 4, 1)], 512: [(128, 32, 32, 4, 1)]},
        "queries": {128: [(128, 64, 32, 4, 1)], 256: [(64, 64, 32, 4, 1)], 512: [(64, 32, 32, 4, 1)]},
        "keys": {128: [(64, 64, 32, 4, 1), (64, 64, 32, 4, 1), (32, 64, 16, 4, 1)],
                 256: [(64, 64, 16, 4, 1), (32, 64, 16, 4, 1)],
                 512: [(32, 64, 16, 4, 1)]},
    },
}
FLOAT32_TILES = {512: [(32, 32, 16, 8, 1)]}  # of every kernel; float32 is for tests
SPLIT_FROM = 384  # padded head sizes, whose sums of dk and of dv do not fit the registers together: a launch for each


@on_its_device
def forward(q_THC: Tensor, k_TGC: Tensor, v_TGU: Tensor, sink_H: Tensor | None, documents: Documents,
            options: Options, keep_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out_THU, and lse_HT if it is to be kept: the logarithm to base 2 of what a row's weights were divided by."""
    (T, H, _), (_, G, U) = q_THC.shape, v_TGU.shape
    out_THU = q_THC.new_empty(T, H, U)
    lse_HT = torch.empty(H, T, dtype=torch.float32, device=q_THC.device) if keep_lse else None
    if T == 0:  # an empty grid cannot be launched
        return out_THU, lse_HT
    constants, compiled = launch("forward", q_THC, v_TGU, H // G, options)
    tiles = _tiles(query_tiles, documents, H // G, *_steps(constants), options.causal, options.window)
    attention_forward.attention_forward[(len(tiles) * G,)](
        q_THC, k_TGC, v_TGU, *_bulk(constants, k_TGC, v_TGU), _float32(sink_H), tiles, out_THU, lse_HT, T, H,
        *_numbers(options), **constants, **compiled)
    return out_THU, lse_HT


@on_its_device
def backward(dout_THU: Tensor, q_THC: Tensor, k_TGC: Tensor, v_TGU: Tensor, sink_H: Tensor | None, out_THU: Tensor,
             lse_HT: Tensor, documents: Documents, options: Options,
             needs: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and sink, each where it is needed."""
    (T, H, _), G = q_THC.shape, k_TGC.shape[1]
    needs_q, needs_k, needs_v, needs_sink = needs
    dq, dk, dv = (torch.empty_like(x) if need else None
                  for x, need in zip((q_THC, k_TGC, v_TGU), needs[:3], strict=True))
    delta_HT = torch.empty_like(lse_HT)
    numbers, masks = (T, H, options.scale, *_numbers(options)), (options.causal, options.window)
    if T > 0 and (needs_q or needs_k or needs_sink):
        constants, compiled = launch("queries", q_THC, v_TGU, H // G, options)
        tiles = _tiles(query_tiles, documents, H // G, *_steps(constants), *masks)
        attention_backward.attention_queries[(len(tiles) * G,)](
            q_THC, k_TGC, v_TGU, *_bulk(constants, k_TGC, v_TGU), out_THU, dout_THU, lse_HT, tiles, dq, delta_HT,
            *numbers, **constants, **compiled)
    if T > 0 and (needs_k or needs_v):
        constants, compiled = launch("keys", q_THC, v_TGU, H // G, options)
        tiles = _tiles(key_tiles, documents, H // G, *_steps(constants), *masks)
        for wanted in key_launches(dk, dv, constants["BLOCK_C"] + constants["BLOCK_U"]):
            attention_backward.attention_keys[(len(tiles) * G,)](
                q_THC, k_TGC, v_TGU, dout_THU, *_bulk_rows(constants, q_THC, dout_THU), lse_HT, delta_HT, tiles,
                *wanted, *numbers, **constants, **compiled)
    dsink = None
    if needs_sink:
        share_HT = torch.exp2(_float32(sink_H)[:, None] * LOG2_E - lse_HT)
        dsink = -(share_HT * delta_HT).sum(dim=1).to(sink_H.dtype)
    return dq, dk, dv, dsink


def key_launches(dk, dv, padded: int) -> list[tuple]:
    """What each launch over the keys writes."""
    if dk is None or dv is None or padded < SPLIT_FROM:
        return [(dk, dv)]
    return [(dk, None), (None, dv)]


def launch(kernel: str, q_THC: Tensor, v_TGU: Tensor, group: int, options: Options) -> tuple[dict, dict]:
    """The constexprs and the options of a kernel for these tensors."""
    constants = dict(C=q_THC.shape[2], U=v_TGU.shape[2], GROUP=group, CAUSAL=options.causal,
                     DROPOUT=options.dropout > 0, EXACT=exact(q_THC))
    blocks, compiled = choose(kernel, architecture(q_THC.device), q_THC.dtype, constants["C"], constants["U"],
                              options.softcap is not None, constants["DROPOUT"])
    return constants | blocks, compiled


def choose(kernel: str, name: str, dtype: torch.dtype, C: int, U: int, softcap: bool,
           dropout: bool) -> tuple[dict, dict]:
    """Blocks and options of a kernel on an architecture."""
    if max(C, U) > MAX_HEAD_SIZE:
        raise ValueError(f"heads have size {max(C, U)}: want at most {MAX_HEAD_SIZE} in the Triton kernels")
    if dtype == torch.float32 and name != "interpreter":
        table = FLOAT32_TILES
    else:
        table = TILES[known_as(name)][kernel]
    padded = padded_size(C), padded_size(U)
    entry = next(entry for most, entry in table.items() if sum(padded) <= most)
    block_m, block_n, edge, warps, stages = entry[min(2 if dropout else int(softcap), len(entry) - 1)]
    blocks = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_EDGE=edge, BLOCK_C=padded[0], BLOCK_U=padded[1])
    return blocks, dict(num_warps=warps, num_stages=stages)


def known_as(name: str) -> str:
    """The architecture whose tiles this one takes."""
    for known in (name, *older(name)):
        if known in TILES:
            return known
    raise ValueError(f"attention has no tiles for {name}: want one of {', '.join(TILES)}")


def padded_size(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)


def _numbers(options: Options) -> tuple:
    """factor, inner, window, seed, threshold, gain of the kernels."""
    cap = options.softcap
    signed = options.seed - 2**64 if options.seed >= 2**63 else options.seed
    return ((options.scale if cap is None else cap) * LOG2_E, None if cap is None else options.scale / cap,
            options.window, signed, dropout.threshold(options.dropout), 1 / (1 - options.dropout))


def _steps(constants: dict) -> tuple[int, int, int]:
    return constants["BLOCK_M"], constants["BLOCK_N"], constants["BLOCK_EDGE"]


def _tiles(make: Callable[..., Tensor], documents: Documents, *sizes) -> Tensor:
    """A table of tiles, made once for a batch and kept with it: a captured graph reads it while the batch lives."""
    key = (make, *sizes)
    if key not in documents.tables:
        documents.tables[key] = make(documents.boundaries, *sizes, documents.cu_seqlens.device)
    return documents.tables[key]


def _bulk(constants: dict, k_TGC: Tensor, v_TGU: Tensor) -> tuple[TensorDescriptor | None, ...]:
    """Descriptors of keys and values by head: [G, T, C], a block is of one head."""
    if not _by_bulk(k_TGC, v_TGU):
        return None, None
    made = []
    for x, block in ((k_TGC, constants["BLOCK_C"]), (v_TGU, constants["BLOCK_U"])):
        T, G, C = x.shape
        made.append(TensorDescriptor(x, [G, T, C], [C, G * C, 1], [1, constants["BLOCK_N"], block]))
    return tuple(made)


def _bulk_rows(constants: dict, q_THC: Tensor, dout_THU: Tensor) -> tuple[TensorDescriptor | None, ...]:
    """Descriptors of q and dout as rows: [G, T, GROUP, C]."""
    group = constants["GROUP"]
    if not of_whole_tokens(constants, group) or not _by_bulk(q_THC, dout_THU):
        return None, None
    made = []
    for x, block in ((q_THC, constants["BLOCK_C"]), (dout_THU, constants["BLOCK_U"])):
        T, H, C = x.shape
        made.append(TensorDescriptor(x, [H // group, T, group, C], [group * C, H * C, C, 1],
                                     [1, constants["BLOCK_M"] // group, group, block]))
    return tuple(made)


def of_whole_tokens(blocks: dict, group: int) -> bool:
    """Whether steps over rows, which are multiples of an edge's step plus some of a tile's, begin and end a token."""
    return blocks["BLOCK_M"] % group == 0 and blocks["BLOCK_EDGE"] % group == 0


def _by_bulk(*tensors: Tensor) -> bool:
    """Whether bulk copies exist there and can fetch these."""
    return known_as(architecture(tensors[0].device)) in BULK and describable(*tensors)


def _float32(sink_H: Tensor | None) -> Tensor | None:
    return None if sink_H is None else sink_H.detach().float().contiguous()
