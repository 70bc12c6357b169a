"""Time kernels.linear_cross_entropy, the head of a model and its loss, against its peers: time, and memory beside it.

    python -m benchmarks.bench_linear_cross_entropy --out benchmarks/results/linear_cross_entropy.jsonl
    python -m benchmarks.bench_linear_cross_entropy --device cpu --threads 2 --dtypes bfloat16

T tokens, width D, V classes; the loss is the mean over all tokens. FLOPs are those of three products, 6 T D V: whoever
makes the logits again does more. Ours and Liger-Kernel make gradients in the forward, so the two passes are timed as
one, unless --passes says otherwise.

Peers: logits in float32 and cross_entropy ("torch"), which is what the loss of transformers does with the logits of its
head; the same in eight chunks of tokens, each made again backward ("torch chunked"); the fused losses of Liger-Kernel
and cut-cross-entropy where they are installed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from benchmarks import command, harness
from benchmarks.against import against
from benchmarks.harness import NotAvailable, Point, Provider, Step
from kernels import reference

LETTERS = "TDV"
SHAPES = {"cuda": [(16384, 4096, 131072), (8192, 2048, 32768), (8192, 2048, 262144)],
          "cpu": [(4096, 256, 8192), (4096, 512, 8192)]}
CHUNKS = 8
OWN_ROWS = 1024  # of the product of the op's own size: all of them would take as long as the op
LOGIT_SPREAD = 2.0  # standard deviation of the logits


class Inputs:
    """One point's tensors, made on its device."""

    def __init__(self, point: Point):
        self.T, self.D, self.V = (point.shape[letter] for letter in LETTERS)
        self.device = point.device
        generator = torch.Generator(point.device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=point.device, dtype=point.dtype)
            return values.mul_(scale).requires_grad_()

        self.h_TD, self.w_VD = normal(self.T, self.D), normal(self.V, self.D, scale=LOGIT_SPREAD * self.D**-0.5)
        self.label_T = torch.randint(self.V, (self.T,), generator=generator, device=point.device)
        self.weight_T = torch.full((self.T,), 1 / self.T, device=point.device)

    def step(self, function: Callable[[], Tensor], backend: str = "") -> Step:
        """function: the loss."""
        return Step(lambda: (function(),), (self.h_TD, self.w_VD), (torch.ones((), device=self.device),),
                    backend=backend, named=lambda got: dict(zip(("loss", "dh", "dw"), got, strict=True)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__, "bench_linear_cross_entropy", ",".join(LETTERS))
    parser.set_defaults(passes=["both"])
    options = parser.parse_args(arguments)
    settings = command.settings_of(options)
    points = [point_of(shape, dtype, options.device)
              for shape in command.shapes_of(options, LETTERS, SHAPES[options.device])
              for dtype in command.dtypes_of(options)][options.skip:]

    def build(point: Point) -> tuple[Provider, Sequence[Provider]]:
        inputs = Inputs(point)
        return Provider("reference", lambda: plain(inputs)), command.wanted(providers(inputs), options)

    rows = harness.run(points, build, settings)
    against(rows, points, settings, "the peers")
    return harness.status_of(rows)


def point_of(shape: dict[str, int], dtype: torch.dtype, device: str) -> Point:
    T, D, V = (shape[letter] for letter in LETTERS)
    return Point("linear_cross_entropy", shape, dtype, device, flops=flops(**shape),
                 own_product=(min(T, OWN_ROWS), V, D))


def flops(T: int, D: int, V: int) -> dict[str, float]:
    product = 2 * T * D * V
    return {"forward": product, "backward": 2 * product, "both": 3 * product}


def providers(i: Inputs) -> list[Provider]:
    own = [Provider(f"kernels ({name})", lambda name=name: ours(i, name)) for name in harness.ours(i.device)]
    peers = {"torch": in_torch, "torch chunked": chunked, "transformers": transformers, "liger-kernel": liger,
             "cut-cross-entropy": cut}
    return own + [Provider(name, lambda make=make: make(i)) for name, make in peers.items()]


def plain(i: Inputs) -> Step:
    """The equation, a chunk of tokens at a time: its float32 operands would not fit beside all logits."""
    return i.step(lambda: by_chunk(i, lambda h_nD, label_n: reference.linear_cross_entropy(
        h_nD, i.w_VD, label_n, i.weight_T[:len(label_n)]).loss))


def ours(i: Inputs, backend: str) -> Step:
    return i.step(lambda: kernels.linear_cross_entropy(i.h_TD, i.w_VD, i.label_T, i.weight_T).loss, backend)


def in_torch(i: Inputs) -> Step:
    return i.step(lambda: F.cross_entropy(F.linear(i.h_TD, i.w_VD).float(), i.label_T))


def chunked(i: Inputs) -> Step:
    return i.step(lambda: by_chunk(i, lambda h_nD, label_n: F.cross_entropy(
        F.linear(h_nD, i.w_VD).float(), label_n, reduction="sum")) / i.T)


def by_chunk(i: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The sum over chunks of tokens; nothing of one is kept for backward."""
    return sum(checkpoint(loss, h_nD, label_n, use_reentrant=False)
               for h_nD, label_n in zip(i.h_TD.chunk(CHUNKS), i.label_T.chunk(CHUNKS), strict=True))


def transformers(i: Inputs) -> Step:
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError as error:
        raise NotAvailable("transformers with ForCausalLMLoss is not installed") from error
    return i.step(lambda: ForCausalLMLoss(F.linear(i.h_TD, i.w_VD), None, i.V, shift_labels=i.label_T))


def liger(i: Inputs) -> Step:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise NotAvailable("liger-kernel is not installed") from error
    loss = LigerFusedLinearCrossEntropyLoss()
    return i.step(lambda: loss(i.w_VD, i.h_TD, i.label_T))


def cut(i: Inputs) -> Step:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise NotAvailable("cut-cross-entropy is not installed") from error
    return i.step(lambda: linear_cross_entropy(i.h_TD, i.w_VD, i.label_T))


if __name__ == "__main__":
    raise SystemExit(main())
