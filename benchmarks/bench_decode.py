"""Time kernels.decode: one new token of each of B sequences over its cache of L tokens, G key heads of size C.

    python -m benchmarks.bench_decode --out benchmarks/results/decode.jsonl

Bound by bandwidth: the bytes are those of the cache, read once, and it is compared with a copy. "contiguous" caches
are [B, L, G, C]; of "paged" ones the pages of 64 tokens lie in a random order. There is no gradient, so forward is the
only pass. Peer: torch's scaled_dot_product_attention on the same cache, with grouped heads ("sdpa"), and with the
query heads of a group as rows of one head ("heads packed", as transformers does on a CPU); for pages with the cache
gathered before, which is all there is to do without a kernel that knows them.

On a GPU it is timed twice: launched by the host, and as a replayed CUDA graph, which is the kernels' own time.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks import command, harness
from benchmarks.against import against
from benchmarks.harness import Point, Provider, Step
from kernels import reference

LETTERS = "BLHGC"
SHAPES = {"cuda": [(B, L, 32, 8, 128) for L in (8192, 1024, 32768) for B in (16, 1, 64)],
          "cpu": [(B, L, 8, 2, 64) for L in (512, 2048) for B in (1, 16, 64)]}
PAGE = 64
MODES = ("contiguous", "paged")


class Inputs:
    """One point's tensors, made on its device."""

    def __init__(self, point: Point):
        B, L, H, G, C = (point.shape[letter] for letter in LETTERS)
        self.B, self.L, self.H, self.G, self.C, self.device = B, L, H, G, C, point.device
        generator = torch.Generator(point.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=point.device, dtype=point.dtype)

        self.q_BHC = normal(B, H, C)
        self.length_B = torch.full((B,), L, dtype=torch.int32, device=point.device)
        if point.op == "decode: paged":
            pages = -(-L // PAGE)
            order = torch.randperm(B * pages, generator=torch.Generator().manual_seed(1))
            self.page_BN = order.int().view(B, pages).to(point.device)
            self.k_PLGC, self.v_PLGC = normal(B * pages, PAGE, G, C), normal(B * pages, PAGE, G, C)
        else:
            self.page_BN, self.k_PLGC, self.v_PLGC = None, normal(B, L, G, C), normal(B, L, G, C)

    def step(self, function: Callable[[], Tensor], backend: str = "") -> Step:
        """function: out_BHC."""
        return Step(lambda: (function(),), (), (), lambda got: {"out": got[0]}, backend)


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, "bench_decode", ",".join(LETTERS), modes=MODES).parse_args(arguments)
    settings = replace(command.settings_of(options, graphs=options.device == "cuda"), passes=("forward",))
    points = [point_of(shape, dtype, options.device, mode) for mode in options.modes
              for shape in command.shapes_of(options, LETTERS, SHAPES[options.device])
              for dtype in command.dtypes_of(options)][options.skip:]

    def build(point: Point) -> tuple[Provider, Sequence[Provider]]:
        inputs = Inputs(point)
        return Provider("reference", lambda: ours(inputs, reference)), command.wanted(providers(inputs), options)

    rows = harness.run(points, build, settings)
    against(rows, points, settings, "torch")
    return harness.status_of(rows)


def point_of(shape: dict[str, int], dtype: torch.dtype, device: str, mode: str) -> Point:
    return Point(f"decode: {mode}", shape, dtype, device, bytes_moved=bytes_moved(**shape, itemsize=dtype.itemsize))


def bytes_moved(B: int, L: int, H: int, G: int, C: int, itemsize: int) -> dict[str, float]:
    """Keys and values are read; queries and results are small, but they are there."""
    return {"forward": 2 * B * L * G * C * itemsize + 2 * B * H * C * itemsize}


def providers(i: Inputs) -> list[Provider]:
    own = [Provider(f"kernels ({name})", lambda name=name: ours(i, kernels, name), captured=name == "triton")
           for name in harness.ours(i.device)]
    return own + [Provider("torch sdpa", lambda: sdpa(i, packed=False)),
                  Provider("torch sdpa, heads packed", lambda: sdpa(i, packed=True))]


def ours(i: Inputs, ops, backend: str = "") -> Step:
    def function() -> Tensor:
        with torch.no_grad():
            return ops.decode(i.q_BHC, i.k_PLGC, i.v_PLGC, i.length_B, i.page_BN)

    return i.step(function, backend)


def sdpa(i: Inputs, packed: bool) -> Step:
    page_BN = None if i.page_BN is None else i.page_BN.long()

    def function() -> Tensor:
        k_BGLC, v_BGLC = ((x if page_BN is None else x[page_BN].flatten(1, 2)[:, :i.L]).transpose(1, 2)
                          for x in (i.k_PLGC, i.v_PLGC))
        q_B = i.q_BHC.view(i.B, i.G, i.H // i.G, i.C) if packed else i.q_BHC.view(i.B, i.H, 1, i.C)
        out_B = F.scaled_dot_product_attention(q_B, k_BGLC, v_BGLC, enable_gqa=not packed and i.H != i.G)
        return out_B.reshape(i.B, i.H, i.C)

    return i.step(function)


if __name__ == "__main__":
    raise SystemExit(main())
