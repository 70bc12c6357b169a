"""Time kernels.attention against its peers: B documents of L tokens, H query heads, G key heads of size C, v's of U.

    python -m benchmarks.bench_attention --out benchmarks/results/attention.jsonl
    python -m benchmarks.bench_attention --device cpu --threads 2 --modes causal packed --dtypes bfloat16

A mode adds one thing to causal attention ("full": takes it away). "packed" has B * L tokens in documents whose lengths
are drawn, with a long tail: the median is 300, none has more than L. FLOPs are those of the pairs of tokens that see
each other, and of nothing else: two products forward and five backward, 4 C and 10 C for a pair and head if U is C.

Peers get what their users do. torch's scaled_dot_product_attention has each of its kernels forced in turn; a window or
packed documents are a dense mask there. FlexAttention is compiled, flash-attn of each generation has cu_seqlens. On a
CPU transformers' own two functions come with the masks that its models make. Masks are made once, outside of the time,
as they are once for all layers; so are our documents. The peers are in attention_peers.py.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from benchmarks import attention_peers, command, harness
from benchmarks.against import against
from benchmarks.harness import Point, Provider, Step
from kernels import reference
from kernels.reference import Documents

LETTERS = "BLHGCU"
HEADS = [(32, 8, 128, 128), (16, 16, 128, 128), (32, 8, 64, 64), (16, 16, 192, 128), (16, 16, 256, 256)]
SHAPES = {
    "cuda": [(16384 // L, L, *heads) for heads in HEADS for L in (2048, 8192, 16384)],
    "cpu": [(8, 512, 4, 2, 64, 64), (8, 512, 8, 4, 64, 64)],
}
MODES = ("causal", "packed", "full", "window", "softcap", "sink")
WINDOW = {"cuda": 1024, "cpu": 128}
SOFTCAP = 5.0  # small enough to change scores of standard deviation 1, so that whoever leaves it out is found
MEDIAN, SPREAD = 300, 1.0  # of a packed document's length, and of its logarithm: the mean is about 500
NAMES = ("out", "dq", "dk", "dv", "dsink")


class Inputs:
    """One point's tensors, made on its device."""

    def __init__(self, point: Point):
        self.B, self.L, self.H, self.G, self.C, self.U = (point.shape[letter] for letter in LETTERS)
        self.device, self.dtype, self.mode, self.options = point.device, point.dtype, *mode_of(point)
        self.lengths = lengths(self.mode, self.B, self.L)
        self.documents = kernels.documents([0, *accumulate(self.lengths)], point.device)
        generator = torch.Generator(point.device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = point.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device=point.device, dtype=dtype).requires_grad_()

        T = self.B * self.L
        self.q_THC, self.k_TGC, self.v_TGU = normal(T, self.H, self.C), normal(T, self.G, self.C), normal(
            T, self.G, self.U)
        self.dout_THU = normal(T, self.H, self.U).detach()
        self.sink_H = normal(self.H, dtype=torch.float32) if self.mode == "sink" else None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q_THC, self.k_TGC, self.v_TGU, *((self.sink_H,) if self.sink_H is not None else ())

    def step(self, function: Callable[[], Tensor], backend: str = "") -> Step:
        """function: out_THU."""
        return Step(lambda: (function(),), self.leaves, (self.dout_THU,), backend=backend,
                    named=lambda got: dict(zip(NAMES, got, strict=False)))


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, "bench_attention", ",".join(LETTERS), modes=MODES).parse_args(arguments)
    settings = command.settings_of(options)
    points = [point_of(shape, dtype, options.device, mode) for mode in options.modes
              for shape in command.shapes_of(options, LETTERS, SHAPES[options.device])
              for dtype in command.dtypes_of(options)][options.skip:]

    def build(point: Point) -> tuple[Provider, Sequence[Provider]]:
        inputs = Inputs(point)
        return Provider("reference", lambda: plain(inputs)), command.wanted(providers(inputs), options)

    rows = harness.run(points, build, settings)
    against(rows, points, settings, "the peers")
    return harness.status_of(rows)


def point_of(shape: dict[str, int], dtype: torch.dtype, device: str, mode: str) -> Point:
    op = f"attention: {mode}" + f" {WINDOW[device]}" * (mode == "window")
    return Point(op, shape, dtype, device, flops=flops(op, **shape))


def mode_of(point: Point) -> tuple[str, dict]:
    """Its name, and what kernels.attention is told beside the tensors."""
    mode, *number = point.op.removeprefix("attention: ").split()
    more = {"full": {"causal": False}, "window": {"window": int(number[0])} if number else {},
            "softcap": {"softcap": SOFTCAP}}
    return mode, {"causal": True, **more.get(mode, {})}


def lengths(mode: str, B: int, L: int) -> list[int]:
    """Of the documents of a batch of B * L tokens."""
    if mode != "packed":
        return [L] * B
    drawn = torch.randn(B * L, generator=torch.Generator().manual_seed(0)).mul(SPREAD).exp().mul(MEDIAN)
    ends = drawn.int().clamp(1, L).cumsum(0).clamp(max=B * L).unique().tolist()
    return [last - first for first, last in pairwise([0, *ends])]


def flops(op: str, B: int, L: int, H: int, G: int, C: int, U: int) -> dict[str, float]:
    """q k and p v forward; backward q k and dout v again, and dq, dk and dv."""
    mode, *number = op.removeprefix("attention: ").split()
    window = int(number[0]) if number else None
    seen = H * sum(pairs(length, mode != "full", window) for length in lengths(mode, B, L))
    forward, backward = 2 * (C + U) * seen, 2 * (3 * C + 2 * U) * seen
    return {"forward": forward, "backward": backward, "both": forward + backward}


def pairs(length: int, causal: bool, window: int | None) -> int:
    """(query, key) of one document that see each other."""
    back = min(length, window or length)  # keys that the last query sees, itself among them
    causally = back * (back + 1) // 2 + (length - back) * back
    return causally if causal else 2 * causally - length


def plain(i: Inputs) -> Step:
    return i.step(lambda: by_document(*i.leaves[:3], i.documents, sink_H=i.sink_H, **i.options))


def by_document(q_THC: Tensor, k_TGC: Tensor, v_TGU: Tensor, documents: Documents, sink_H: Tensor | None = None,
                **options) -> Tensor:
    """kernels.reference.attention for one document and key head at a time, whose scores are made again backward: all
    of them at once would not fit where documents are long."""
    group = q_THC.shape[1] // k_TGC.shape[1]

    def piece(first: int, last: int, g: int, q: Tensor, k: Tensor, v: Tensor, sink_H: Tensor | None) -> Tensor:
        here, heads = slice(first, last), slice(g * group, (g + 1) * group)
        alone = kernels.documents([0, last - first], str(q.device))
        return reference.attention(q[here, heads], k[here, g:g + 1], v[here, g:g + 1], alone,
                                   sink_H=None if sink_H is None else sink_H[heads], **options)

    return torch.cat([
        torch.cat([checkpoint(piece, first, last, g, q_THC, k_TGC, v_TGU, sink_H, use_reentrant=False)
                   for g in range(k_TGC.shape[1])], dim=1)
        for first, last in pairwise(documents.boundaries)])


def providers(i: Inputs) -> list[Provider]:
    own = [Provider(f"kernels ({name})", lambda name=name: ours(i, name)) for name in harness.ours(i.device)]
    return own + [Provider(name, lambda make=make: i.step(make(i)))
                  for name, make in attention_peers.of(i.device).items()]


def ours(i: Inputs, backend: str) -> Step:
    return i.step(lambda: kernels.attention(i.q_THC, i.k_TGC, i.v_TGU, i.documents, sink_H=i.sink_H, **i.options),
                  backend)


if __name__ == "__main__":
    raise SystemExit(main())
