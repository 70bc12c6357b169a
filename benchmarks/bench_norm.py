"""Time kernels.rms_norm and kernels.add_rms_norm against torch, transformers and Liger-Kernel.

    python -m benchmarks.bench_norm --out benchmarks/results/norm.jsonl

Bound by bandwidth, so compared with a copy. "add" begins with the sum with the residual stream and has two outputs:
the sum and its norm. Where a peer has no such op it adds before. transformers' is LlamaRMSNorm, which Qwen3's equals.

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

LETTERS = "TD"
SHAPES = {"cuda": [(16384, 2048), (16384, 4096), (8192, 8192)], "cpu": [(4096, 256), (4096, 512), (4096, 2048)]}
MODES = ("norm", "add")
EPS = 1e-6


class Inputs:
    """One point's tensors, made on its device."""

    def __init__(self, point: Point):
        T, D = point.shape["T"], point.shape["D"]
        self.D, self.device, self.adds = D, point.device, point.op == "norm: add"
        generator = torch.Generator(point.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=point.device, dtype=point.dtype)

        self.x_TD, self.weight_D = normal(T, D).requires_grad_(), normal(D).requires_grad_()
        self.residual_TD = normal(T, D).requires_grad_() if self.adds else None
        self.upstream = tuple(normal(T, D) for _ in range(1 + self.adds))

    def step(self, norm: Callable[[Tensor], Tensor], add: Callable[[], tuple[Tensor, Tensor]] | None = None,
             weight: Tensor | None = None, backend: str = "") -> Step:
        """norm: out_TD of x_TD; add: sum_TD and out_TD, where that is one op."""
        def function() -> tuple[Tensor, ...]:
            if not self.adds:
                return (norm(self.x_TD),)
            if add is not None:
                return add()
            sum_TD = self.x_TD + self.residual_TD
            return sum_TD, norm(sum_TD)

        leaves = (self.x_TD, *((self.residual_TD,) if self.adds else ()), self.weight_D if weight is None else weight)
        names = ("sum", "out", "dx", "dresidual", "dweight") if self.adds else ("out", "dx", "dweight")
        return Step(function, leaves, self.upstream, backend=backend,
                    named=lambda got: dict(zip(names, got, strict=True)))


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, "bench_norm", ",".join(LETTERS), modes=MODES).parse_args(arguments)
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
    return Point(f"norm: {mode}", shape, dtype, device,
                 bytes_moved=bytes_moved(mode, **shape, itemsize=dtype.itemsize))


def bytes_moved(mode: str, T: int, D: int, itemsize: int) -> dict[str, float]:
    """Forward x to out, and with a sum x and residual to sum and out. Backward x and dout to dx, the sum, its gradient
    and dout to dx. The weight and one number for each row are small."""
    forward, backward = (4, 4) if mode == "add" else (2, 3)
    rows = T * D * itemsize
    return {"forward": forward * rows, "backward": backward * rows, "both": (forward + backward) * rows}


def providers(i: Inputs) -> list[Provider]:
    own = [Provider(f"kernels ({name})", lambda name=name: ours(i, kernels, name), captured=name == "triton")
           for name in harness.ours(i.device)]
    return own + [Provider("torch", lambda: in_torch(i)), Provider("transformers", lambda: transformers(i)),
                  Provider("liger-kernel", lambda: liger(i))]


def ours(i: Inputs, ops, backend: str = "") -> Step:
    return i.step(lambda x_TD: ops.rms_norm(x_TD, i.weight_D, EPS),
                  lambda: ops.add_rms_norm(i.x_TD, i.residual_TD, i.weight_D, EPS), backend=backend)


def in_torch(i: Inputs) -> Step:
    return i.step(lambda x_TD: F.rms_norm(x_TD, (i.D,), i.weight_D, EPS))


def transformers(i: Inputs) -> Step:
    try:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
    except ImportError as error:
        raise NotAvailable("transformers with LlamaRMSNorm is not installed") from error
    module = LlamaRMSNorm(i.D, EPS)
    module.weight = torch.nn.Parameter(i.weight_D.detach())
    return i.step(module, weight=module.weight)


def liger(i: Inputs) -> Step:
    """Not in place, because the gradients sent in are used again."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError as error:
        raise NotAvailable("liger-kernel with fused_add_rms_norm is not installed") from error
    more = (EPS, 0.0, "llama", False)

    def add() -> tuple[Tensor, Tensor]:
        out_TD, sum_TD = LigerFusedAddRMSNormFunction.apply(i.x_TD, i.residual_TD, i.weight_D, *more)
        return sum_TD, out_TD

    return i.step(lambda x_TD: LigerRMSNormFunction.apply(x_TD, i.weight_D, *more), add)


if __name__ == "__main__":
    raise SystemExit(main())
