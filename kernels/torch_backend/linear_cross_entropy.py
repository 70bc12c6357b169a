"""Linear + cross-entropy in PyTorch: chunks of rows, in each a softmax of few rows at a time.

Only rows that count are computed: those that are ignored are left out, so nothing of them reaches a sum. A chunk's
number of rows is padded for the library (kernels/product.py) with copies of its first row that are not read again.

A chunk is large enough for the three products and for adding its dw to the others; a block of its rows is so small
that its float32 logits stay in the caches from the first pass over them to the last. Measured on two cores of an AMD
EPYC (Zen 5, 1 MB of L2 cache each, torch 2.13) in bfloat16 with T 4096, V 8192, D 256 and 512: chunks of 512 to 2048
rows and blocks of 2**18 to 2**20 logits are within 5 % of each other.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.product import product, row_multiple
from kernels.reference import IGNORED, at_least_float32

CHUNK, CHUNK_ROWS = 2**23, 512  # logits of a chunk, but so many rows at least
EXACT, EXACT_ROWS = 2**21, 128  # the same where logits are not kept for a gradient: they take more memory each
BLOCK = 2**19  # logits in float32 at a time


def log_prob(h_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
    """log_prob_T and logsumexp_T, 0 where a label is ignored."""
    results = _zeros(h_TD)
    _log_prob(h_TD, w_VD, label_T, (label_T != IGNORED).nonzero()[:, 0], *results)
    return results


def gradients(h_TD: Tensor, w_VD: Tensor, label_T: Tensor, weight_T: Tensor, z_weight: float,
              needs: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """log_prob_T, logsumexp_T, dh in h's dtype and dw in float32 (float64), each where it is needed."""
    needs_h, needs_w = needs
    V, wide = w_VD.shape[0], at_least_float32(h_TD)
    log_prob_T, logsumexp_T = _zeros(h_TD)
    dh_TD = torch.zeros_like(h_TD) if needs_h else None
    dw_VD = torch.zeros_like(w_VD, dtype=wide) if needs_w else None
    part_VD = torch.empty_like(w_VD) if needs_w else None
    counted_T = (label_T != IGNORED) & (weight_T != 0)
    _log_prob(h_TD, w_VD, label_T, ((label_T != IGNORED) & ~counted_T).nonzero()[:, 0], log_prob_T, logsumexp_T)
    block = _Block(V, wide, h_TD.device)
    z = None
    for row_n, padded_n in _chunks(counted_T.nonzero()[:, 0], max(CHUNK_ROWS, CHUNK // V), row_multiple(h_TD.dtype)):
        n, h = len(row_n), h_TD[padded_n]
        z = h.new_empty(len(h), V) if z is None else z[:len(h)]  # the first chunk is the largest
        product(h, w_VD.T, z)
        label_n1, weight_n1 = label_T[row_n].long()[:, None], weight_T[row_n][:, None]
        log_prob_n1, logsumexp_n1 = block.become_gradients(z[:n], label_n1, weight_n1, z_weight)
        log_prob_T[row_n], logsumexp_T[row_n] = log_prob_n1[:, 0], logsumexp_n1[:, 0]
        z[n:].zero_()
        if needs_h:
            dh_TD[row_n] = product(z, w_VD)[:n]
        if needs_w:
            dw_VD += product(z.T, h, part_VD)
    return log_prob_T, logsumexp_T, dh_TD, dw_VD


def _zeros(h_TD: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.zeros(h_TD.shape[0], dtype=at_least_float32(h_TD), device=h_TD.device) for _ in range(2))


def _chunks(row_N: Tensor, step: int, multiple: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows, and the same padded to a multiple with the first of them."""
    for row_n in row_N.split(step) if len(row_N) > 0 else ():
        yield row_n, torch.cat([row_n, row_n[:1].expand(-len(row_n) % multiple)])


def _log_prob(h_TD: Tensor, w_VD: Tensor, label_T: Tensor, row_N: Tensor, log_prob_T: Tensor,
              logsumexp_T: Tensor) -> None:
    """Write what belongs to these rows."""
    V = w_VD.shape[0]
    for row_n, padded_n in _chunks(row_N, max(EXACT_ROWS, EXACT // V), row_multiple(h_TD.dtype)):
        z = _logits(h_TD[padded_n], w_VD)[:len(row_n)]
        logsumexp_n1 = _softmax(z, torch.empty_like(z))
        log_prob_T[row_n] = (z.gather(1, label_T[row_n].long()[:, None]) - logsumexp_n1)[:, 0]
        logsumexp_T[row_n] = logsumexp_n1[:, 0]


def _logits(h_nD: Tensor, w_VD: Tensor) -> Tensor:
    """h w^T, not rounded to h's dtype."""
    wide = at_least_float32(h_nD)
    if h_nD.dtype == wide:
        return product(h_nD, w_VD.T)
    if h_nD.device.type == "cuda":
        return torch.mm(h_nD, w_VD.T, out_dtype=wide)
    # No product on a CPU takes bfloat16 to float32. The second one below gives what the first one
    # lost to rounding: 16 bits of every logit, at 60 % of the time of a product in float32.
    rounded = product(h_nD, w_VD.T)
    rest = torch.addmm(rounded, h_nD, w_VD.T, beta=-1)
    return rounded.to(wide).add_(rest)


def _softmax(z_nV: Tensor, p_nV: Tensor) -> Tensor:
    """Write the softmax of z to p; return logsumexp_n1: torch's own takes twice as long as its softmax, so the sum is
    read off the largest probability, which is 1 / sum of exp(z - largest z)."""
    torch.softmax(z_nV, 1, out=p_nV)
    return z_nV.amax(1, keepdim=True) - p_nV.amax(1, keepdim=True).log_()


class _Block:
    """Room for the logits of a few rows in float32 (float64), and for their softmax."""

    def __init__(self, V: int, wide: torch.dtype, device: torch.device):
        self.rows = max(1, BLOCK // V)
        self._z, self._p = (torch.empty(self.rows, V, dtype=wide, device=device) for _ in range(2))
        self._minus_one = torch.full((self.rows, 1), -1.0, dtype=wide, device=device)

    def become_gradients(self, z_nV: Tensor, label_n1: Tensor, weight_n1: Tensor,
                         z_weight: float) -> tuple[Tensor, Tensor]:
        """z becomes weight * (p * (1 + 2 z_weight logsumexp) - onehot). Return log_prob_n1 and logsumexp_n1."""
        log_prob_n1, logsumexp_n1 = torch.empty_like(weight_n1), torch.empty_like(weight_n1)
        for first in range(0, len(z_nV), self.rows):
            rows = slice(first, min(first + self.rows, len(z_nV)))
            n, label = rows.stop - first, label_n1[rows]
            z, p = self._z[:n].copy_(z_nV[rows]), self._p[:n]
            logsumexp = _softmax(z, p)
            logsumexp_n1[rows] = logsumexp
            torch.sub(z.gather(1, label), logsumexp, out=log_prob_n1[rows])
            if z_weight:
                p.mul_(1 + 2 * z_weight * logsumexp)
            p.scatter_add_(1, label, self._minus_one[:n])
            torch.mul(p, weight_n1[rows], out=z_nV[rows])
        return log_prob_n1, logsumexp_n1
