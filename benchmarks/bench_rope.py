"""Time kernels.rope against transformers and Liger-Kernel: T tokens, H query and G key heads of size C.

    python -m benchmarks.bench_rope --out benchmarks/results/rope.jsonl

Bound by bandwidth, so compared with a copy. "normed" norms every head of q and k first, with weights of its own for
each, as Qwen3 does; nobody else has that as one op. Peers: transformers' apply_rotary_pos_emb behind its Qwen3RMSNorm;
the same rotation behind torch's rms_norm ("torch"); Liger-Kernel's, behind its own norm, with copies of its inputs,
because it rotates in place. Their tables are [T, C] in q's dtype, as models make them, ours are [T, C / 2] in float32.

On a GPU every pass is timed twice: launched by the host, and as a replayed CUDA graph, which is the kernels' own time.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks import command, harness
from benchmarks.against import against
from benchmarks.harness import NotAvailable, Point, Provider, Step
from kernels import reference

LETTERS = "THGC"
SHAPES = {"cuda": [(16384, 32, 8, 128), (16384, 32, 8, 64), (16384, 16, 16, 128)],
          "cpu": [(4096, 4, 2, 64), (4096, 8, 4, 64)]}
MODES = ("plain", "normed")
EPS, THETA = 1e-6, 10_000.0
DOCUMENT = 512  # tokens from position 0 on; more would cost the peers, whose tables are rounded, digits
Turn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Inputs:
    """One point's tensors, made on its device."""

    def __init__(self, point: Point):
        T, H, G, C = (point.shape[letter] for letter in LETTERS)
        self.C, self.device, self.dtype, self.normed = C, point.device, point.dtype, point.op == "rope: normed"
        generator = torch.Generator(point.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=point.device, dtype=point.dtype)

        self.q_THC, self.k_TGC = normal(T, H, C).requires_grad_(), normal(T, G, C).requires_grad_()
        self.weights = tuple(normal(C).requires_grad_() for _ in range(2)) if self.normed else ()
        self.upstream = normal(T, H, C), normal(T, G, C)
        position_T = torch.arange(T, device=point.device) % DOCUMENT
        self.cos_TR, self.sin_TR = kernels.rope_table(position_T, C, THETA)

    @property
    def tables(self) -> list[Tensor]:
        """cos and sin as models of transformers make them."""
        return [torch.cat([x_TR, x_TR], dim=1).to(self.dtype)[None] for x_TR in (self.cos_TR, self.sin_TR)]

    def step(self, function: Callable[[], tuple[Tensor, Tensor]], leaves: tuple[Tensor, ...] | None = None,
             upstream: tuple[Tensor, ...] | None = None, backend: str = "") -> Step:
        """function: q_THC and k_TGC."""
        names = ("q", "k", "dq", "dk", "dq_weight", "dk_weight")
        return Step(function, leaves or (self.q_THC, self.k_TGC, *self.weights), upstream or self.upstream,
                    backend=backend, named=lambda got: dict(zip(names, got, strict=False)))


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, "bench_rope", ",".join(LETTERS), modes=MODES).parse_args(arguments)
    settings = command.settings_of(options, graphs=options.device == "cuda")
    points = [point_of(shape, dtype, options.device, mode) for mode in options.modes
              for shape in command.shapes_of(options, LETTERS, SHAPES[options.device])
              for dtype in command.dtypes_of(options)][options.skip:]

    def build(point: Point) -> tuple[Provider, Sequence[Provider]]:
        inputs = Inputs(point)
        return Provider("reference", lambda: ours(inputs, reference)), command.wanted(providers(inputs), options)

    rows = harness.run(points, build, settings)
    against(rows, points, settings, "the peers")
    return harness.status_of(rows)


def point_of(shape: dict[str, int], dtype: torch.dtype, device: str, mode: str) -> Point:
    return Point(f"rope: {mode}", shape, dtype, device,
                 bytes_moved=bytes_moved(mode, **shape, itemsize=dtype.itemsize))


def bytes_moved(mode: str, T: int, H: int, G: int, C: int, itemsize: int) -> dict[str, float]:
    """q, k and the table are read, q and k written; backward their gradients, and with norms q and k once more."""
    heads, table = T * (H + G) * C * itemsize, T * C * 4
    forward, backward = 2 * heads + table, (3 if mode == "normed" else 2) * heads + table
    return {"forward": forward, "backward": backward, "both": forward + backward}


def providers(i: Inputs) -> list[Provider]:
    own = [Provider(f"kernels ({name})", lambda name=name: ours(i, kernels, name), captured=name == "triton")
           for name in harness.ours(i.device)]
    return own + [Provider("torch", lambda: in_torch(i)), Provider("transformers", lambda: transformers(i)),
                  Provider("liger-kernel", lambda: liger(i))]


def ours(i: Inputs, ops, backend: str = "") -> Step:
    norms = (*i.weights, EPS) if i.normed else ()
    return i.step(lambda: ops.rope(i.q_THC, i.k_TGC, i.cos_TR, i.sin_TR, *norms), backend=backend)


def in_torch(i: Inputs) -> Step:
    cos_T1C, sin_T1C = (table[0, :, None] for table in i.tables)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos_T1C + torch.cat([-b, a], dim=-1) * sin_T1C

    def function() -> tuple[Tensor, Tensor]:
        q, k = i.q_THC, i.k_TGC
        if i.normed:
            q, k = (F.rms_norm(x, (i.C,), weight_C, EPS) for x, weight_C in zip((q, k), i.weights, strict=True))
        return turned(q), turned(k)

    return i.step(function)


def transformers(i: Inputs) -> Step:
    try:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb
    except ImportError as error:
        raise NotAvailable("transformers with Qwen3 is not installed") from error
    norms = [Qwen3RMSNorm(i.C, EPS) for _ in i.weights]
    for norm, weight_C in zip(norms, i.weights, strict=True):
        norm.weight = torch.nn.Parameter(weight_C.detach())
    cos, sin = i.tables

    def function() -> tuple[Tensor, Tensor]:
        q, k = (norm(x) for norm, x in zip(norms, (i.q_THC, i.k_TGC), strict=True)) if norms else (i.q_THC, i.k_TGC)
        return by_heads(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), q, k)

    return i.step(function, (i.q_THC, i.k_TGC, *(norm.weight for norm in norms)))


def liger(i: Inputs) -> Step:
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError as error:
        raise NotAvailable("liger-kernel with rope is not installed") from error
    own_q, own_k = (x.detach().clone().requires_grad_() for x in (i.q_THC, i.k_TGC))
    cos, sin = i.tables

    def function() -> tuple[Tensor, Tensor]:
        q, k = own_q, own_k
        if i.normed:
            q, k = (LigerRMSNormFunction.apply(x, weight_C, EPS, 0.0, "llama", False)
                    for x, weight_C in zip((q, k), i.weights, strict=True))
        return by_heads(lambda q, k: liger_rotary_pos_emb(q, k, cos, sin)[:2], q, k)

    return i.step(function, (own_q, own_k, *i.weights), tuple(x.clone() for x in i.upstream))


def by_heads(turn: Turn, q_THC: Tensor, k_TGC: Tensor) -> tuple[Tensor, Tensor]:
    """`turn` takes and returns [1, heads, T, C], the layout of transformers."""
    q, k = turn(q_THC.transpose(0, 1)[None], k_TGC.transpose(0, 1)[None])
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


if __name__ == "__main__":
    raise SystemExit(main())
