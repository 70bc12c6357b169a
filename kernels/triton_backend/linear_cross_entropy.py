"""Linear + cross-entropy on the device, in one stream, without a wait for the host.

    gradients   rows by chunks: the library's product gives float32 logits, one program a row turns them into their
                gradient, and the library multiplies it with w and h. dw is added up in float32 by the product itself.
    log_prob    one kernel: tiles of logits, of which only the largest, the sum and the label's are kept

The row of a gradient is read twice, for its sum and for its softmax: of the sizes met here the second time from the L2
cache. Half-precision gradients go to a buffer of their own, float32 ones where the logits were.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.reference import IGNORED
from kernels.triton_backend import linear_cross_entropy_kernels as programs
from kernels.triton_backend.configurations import older
from kernels.triton_backend.launch import architecture, describable, exact, on_its_device

# A chunk: so many logits (6 bytes each in half precision), but no fewer rows: below, adding a chunk's dw to the others
# (8 bytes for each of V * D) would take longer than a tenth of the three products.
CHUNK, CHUNK_ROWS = 2**27, 2048
ROW = {"BLOCK": 4096}, {"num_warps": 8}
MERGE = {"BLOCK": 128}, {"num_warps": 4}
GROUP = 16  # tiles of rows that walk the vocabulary side by side: their rows and what they read of w fit the L2 cache


@dataclass(frozen=True)
class Tile:
    """How log_prob runs. Chosen by architecture and dtype alone, so that how many rows there are changes no sum."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    flatten: bool = False  # the next tile's first loads start under this tile's sums
    per_split: int = 16  # tiles of the vocabulary that one program walks

    def constants(self) -> dict[str, int | bool]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "PER_SPLIT": self.per_split,
                "GROUP": GROUP, "FLATTEN": self.flatten}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Not timed: chosen from compile reports (registers, no spills, shared memory). float32 is for tests.
HALF = {
    "sm_80": Tile(128, 128, 32, 8, 4),
    "sm_90": Tile(128, 256, 64, 8, 4, tma=True),
    "sm_100": Tile(128, 256, 64, 8, 4, tma=True),
    "gfx942": Tile(128, 128, 64, 8, 2),
    "interpreter": Tile(32, 32, 32, 4, 1, tma=True, per_split=2),  # small, so that tests meet every edge
}
FLOAT32 = {"interpreter": Tile(32, 32, 32, 4, 1, per_split=2)}
ANY_FLOAT32 = Tile(64, 64, 16, 8, 2)


@on_its_device
def log_prob(h_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
    """log_prob_T and logsumexp_T, 0 where a label is ignored."""
    (T, D), V = h_TD.shape, w_VD.shape[0]
    log_prob_T, logsumexp_T = (torch.empty(T, dtype=torch.float32, device=h_TD.device) for _ in range(2))
    if T == 0:
        return log_prob_T, logsumexp_T
    tile = choose(architecture(h_TD.device), h_TD.dtype)
    splits = triton.cdiv(V, tile.block_n * tile.per_split)
    most_ST, total_ST = (h_TD.new_empty(splits, T, dtype=torch.float32) for _ in range(2))
    labels_T = torch.full_like(log_prob_T, math.nan)  # the logit of the label
    tma = tile.tma and describable(h_TD, w_VD)
    h = TensorDescriptor(h_TD, [T, D], [D, 1], [tile.block_m, tile.block_k]) if tma else h_TD
    w = TensorDescriptor(w_VD, [V, D], [D, 1], [tile.block_n, tile.block_k]) if tma else w_VD
    programs.partial_sums[(triton.cdiv(T, tile.block_m) * splits,)](
        h, w, label_T, most_ST, total_ST, labels_T, T, D, V, TMA=tma, EXACT=exact(h_TD), **tile.constants(),
        **tile.options())
    constants, options = MERGE
    programs.merge[(triton.cdiv(T, constants["BLOCK"]),)](
        most_ST, total_ST, labels_T, label_T, log_prob_T, logsumexp_T, T, splits, IGNORED=IGNORED, **constants,
        **options)
    return log_prob_T, logsumexp_T


@on_its_device
def gradients(h_TD: Tensor, w_VD: Tensor, label_T: Tensor, weight_T: Tensor, z_weight: float,
              needs: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """log_prob_T, logsumexp_T, dh in h's dtype and dw in float32, each where it is needed."""
    needs_h, needs_w = needs
    T, V = h_TD.shape[0], w_VD.shape[0]
    weight_T = weight_T.float()
    log_prob_T, logsumexp_T = (torch.empty(T, dtype=torch.float32, device=h_TD.device) for _ in range(2))
    dh_TD = torch.empty_like(h_TD) if needs_h else None
    dw_VD = torch.zeros_like(w_VD, dtype=torch.float32) if needs_w else None
    step = min(T, max(CHUNK_ROWS, CHUNK // V // 128 * 128))
    z = h_TD.new_empty(step, V, dtype=torch.float32)
    dz = z if h_TD.dtype == torch.float32 else h_TD.new_empty(step, V)
    constants, options = ROW
    for first in range(0, T, step or 1):
        rows = slice(first, min(first + step, T))
        n = rows.stop - first
        _product(h_TD[rows], w_VD.T, z[:n])
        programs.row_gradient[(n,)](z, label_T[rows], weight_T[rows], dz, log_prob_T[rows], logsumexp_T[rows],
                                    float(z_weight), V, IGNORED=IGNORED, **constants, **options)
        if needs_h:
            torch.mm(dz[:n], w_VD, out=dh_TD[rows])
        if needs_w:
            # A row that does not count has a gradient of 0, but 0 * NaN would be NaN.
            counted_n1 = ((label_T[rows] != IGNORED) & (weight_T[rows] != 0))[:, None]
            _add_product(dw_VD, dz[:n].T, torch.where(counted_n1, h_TD[rows], 0.0))
    return log_prob_T, logsumexp_T, dh_TD, dw_VD


def choose(name: str, dtype: torch.dtype) -> Tile:
    """The tile for an architecture; for one that is not listed, that of the last one listed before it."""
    tiles = FLOAT32 if dtype == torch.float32 else HALF
    if name in tiles:
        return tiles[name]
    if dtype == torch.float32:
        return ANY_FLOAT32
    if not name.startswith("sm_"):
        return HALF["gfx942"]
    return next((HALF[known] for known in older(name) if known in HALF), HALF["sm_80"])


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b in float32, not rounded to their dtype."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda" and not torch.version.hip:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # no product on a CPU, where the interpreter is, takes half precision to float32, and not all on AMD's GPUs
        torch.mm(a.float(), b.float(), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in float32, without room for a b."""
    if a.dtype == torch.float32 or a.device.type != "cuda" or torch.version.hip:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
