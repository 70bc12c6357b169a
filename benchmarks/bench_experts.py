"""Time kernels.experts against its peers: the experts of a mixture, their choice already made.

    python -m benchmarks.bench_experts --out benchmarks/results/experts.jsonl
    python -m benchmarks.bench_experts --device cpu --shapes 4096,512,512,16,4 --loads even zipf empty hot

Every provider begins with which experts a token uses and how much of each, and ends with the sum (and the gradients of
x, both matrices and the weights): sorting by expert is part of each. FLOPs are those the model needs, 6 T K D F forward
and 12 backward, without padding.

Peers: torch's grouped product with autograd, written plainly; the experts module of transformers, as a loop over
experts ("eager") and with grouped_mm; Liger-Kernel, ScatterMoE, SonicMoE and MegaBlocks where they are installed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks import command, harness
from benchmarks.harness import NotAvailable, Point, Provider, Step
from kernels import reference
from kernels.testing import expert_choice

LETTERS = "TDFEK"
SHAPES = {
    "cuda": [(32768, 4096, 2048, 64, 4), (32768, 2048, 768, 128, 8), (24576, 1536, 256, 128, 8),
             (24576, 1536, 1024, 32, 2), (32768, 4096, 512, 128, 8)],  # the first are measured if time runs out
    "cpu": [(4096, 256, 512, 8, 2), (4096, 512, 512, 16, 4), (4096, 512, 256, 64, 8), (4096, 1024, 1024, 8, 2),
            (4096, 1024, 512, 64, 8)],
}
LOADS = ("even", "zipf", "empty", "hot")
GRADIENTS = ("dx", "dw_gate_up", "dw_down", "dweight")


class Inputs:
    """One point's tensors, made on its device."""

    def __init__(self, point: Point):
        T, D, F_, E, K = (point.shape[letter] for letter in LETTERS)
        self.T, self.D, self.F, self.E, self.K, self.device = T, D, F_, E, K, point.device
        generator = torch.Generator(point.device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=point.device, dtype=torch.float32)
            return values.mul_(scale).to(point.dtype).requires_grad_()

        self.x_TD, self.dout_TD = normal(T, D), normal(T, D).detach()
        self.w_gate_up, self.w_down = normal(E, 2 * F_, D, scale=D**-0.5), normal(E, D, F_, scale=F_**-0.5)
        self.weight_TK = torch.randn(T, K, generator=generator, device=point.device).softmax(dim=1).requires_grad_()
        self.expert_TK = expert_choice(T, K, E, point.load).to(point.device)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x_TD, self.w_gate_up, self.w_down, self.weight_TK

    def step(self, function: Callable[[], Tensor], leaves: Sequence[Tensor] | None = None,
             gradients: Callable[..., Sequence[Tensor]] = lambda *given: given, backend: str = "") -> Step:
        """`gradients` brings those of a provider with weights of its own into the layout of ours."""
        return Step(
            lambda: (function(),), tuple(leaves or self.leaves), (self.dout_TD,), backend=backend,
            named=lambda got: {"out": got[0], **dict(zip(GRADIENTS, gradients(*got[1:]), strict=True))})


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, "bench_experts", "T,D,F,E,K", LOADS).parse_args(arguments)
    settings = command.settings_of(options)
    points = [point_of(shape, dtype, options.device, load)
              for shape in command.shapes_of(options, LETTERS, SHAPES[options.device])
              for load in options.loads for dtype in command.dtypes_of(options)][options.skip:]

    def build(point: Point) -> tuple[Provider, Sequence[Provider]]:
        inputs = Inputs(point)
        return Provider("reference", lambda: plain(inputs)), command.wanted(providers(inputs), options)

    return harness.status_of(harness.run(points, build, settings))


def point_of(shape: dict[str, int], dtype: torch.dtype, device: str, load: str) -> Point:
    rows = shape["T"] * shape["K"] // shape["E"]
    return Point("experts", shape, dtype, device, load, flops=flops(**shape),
                 own_product=(max(rows, 1), 2 * shape["F"], shape["D"]))


def flops(T: int, D: int, F: int, E: int, K: int) -> dict[str, float]:
    """Three products of [D, F] for each routed row; backward each of them twice, for its input and its weight."""
    forward = 6 * T * K * D * F
    return {"forward": forward, "backward": 2 * forward, "both": 3 * forward}


def providers(inputs: Inputs) -> list[Provider]:
    own = [Provider(f"kernels ({name})", lambda name=name: ours(inputs, name)) for name in harness.ours(inputs.device)]
    peers = {"torch grouped_mm": torch_grouped, "transformers eager": transformers_eager,
             "transformers grouped_mm": transformers_grouped, "liger-kernel": liger, "scattermoe": scattermoe,
             "sonic-moe": sonic, "megablocks": megablocks}
    return own + [Provider(name, lambda make=make: make(inputs)) for name, make in peers.items()]


def plain(i: Inputs) -> Step:
    dispatch = reference.dispatch(i.expert_TK, i.E)
    return i.step(lambda: reference.experts(i.x_TD, i.w_gate_up, i.w_down, dispatch, i.weight_TK))


def ours(i: Inputs, backend: str) -> Step:
    return i.step(lambda: kernels.experts(i.x_TD, i.w_gate_up, i.w_down, kernels.dispatch(i.expert_TK, i.E),
                                          i.weight_TK), backend=backend)


def torch_grouped(i: Inputs) -> Step:
    grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        raise NotAvailable(f"torch {torch.__version__} has no grouped_mm")

    def forward() -> Tensor:
        sorted_N, order_N = i.expert_TK.flatten().sort(stable=True)
        end_E = torch.searchsorted(sorted_N, torch.arange(i.E, device=i.device, dtype=torch.int32), right=True).int()
        gate, up = grouped_mm(i.x_TD[order_N // i.K], i.w_gate_up.mT, offs=end_E).chunk(2, dim=1)
        y_ND = grouped_mm(F.silu(gate) * up, i.w_down.mT, offs=end_E)
        y_ND = y_ND * i.weight_TK.flatten()[order_N, None].to(y_ND.dtype)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(i.T * i.K, device=i.device))
        return y_ND[place_N].reshape(i.T, i.K, i.D).sum(dim=1)

    return i.step(forward)


def transformers_eager(i: Inputs) -> Step:
    return _transformers(i, "eager")


def transformers_grouped(i: Inputs) -> Step:
    return _transformers(i, "grouped_mm")


def _transformers(i: Inputs, implementation: str) -> Step:
    """MixtralExperts: those of Qwen3-MoE and others are the same code."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError as error:
        raise NotAvailable("transformers with MixtralExperts is not installed") from error
    config = MixtralConfig(hidden_size=i.D, intermediate_size=i.F, num_local_experts=i.E, num_experts_per_tok=i.K)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj = torch.nn.Parameter(i.w_gate_up.detach())
    module.down_proj = torch.nn.Parameter(i.w_down.detach())
    expert_TK = i.expert_TK.long()
    return i.step(lambda: module(i.x_TD, expert_TK, i.weight_TK),
                  leaves=(i.x_TD, module.gate_up_proj, module.down_proj, i.weight_TK))


def liger(i: Inputs) -> Step:
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise NotAvailable("liger-kernel with fused_moe is not installed") from error
    return i.step(lambda: LigerFusedMoEFunction.apply(i.x_TD, i.w_gate_up, i.w_down, i.expert_TK, i.weight_TK))


def scattermoe(i: Inputs) -> Step:
    try:
        from scattermoe import flatten_sort_count, parallel_linear
    except ImportError as error:
        raise NotAvailable("scattermoe is not installed") from error
    expert_TK = i.expert_TK.long()

    def forward() -> Tensor:
        tables = flatten_sort_count(expert_TK, num_experts=i.E)
        gate, up = parallel_linear(i.x_TD, i.w_gate_up.mT, i.K, *tables, grouped_out=True).chunk(2, dim=-1)
        return parallel_linear(F.silu(gate) * up, i.w_down.mT, 1, *tables, grouped_in=True,
                               gates=i.weight_TK.to(i.x_TD.dtype))

    return i.step(forward)


def sonic(i: Inputs) -> Step:
    """Its matrices have gate and up rows in turn."""
    try:
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import moe_general_routing_inputs
    except ImportError as error:
        raise NotAvailable("sonic-moe is not installed") from error
    in_turn = i.w_gate_up.detach().view(i.E, 2, i.F, i.D).transpose(1, 2).reshape(i.E, 2 * i.F, i.D).requires_grad_()
    w_down = i.w_down.detach().clone().requires_grad_()
    token_N = torch.arange(i.T, device=i.device, dtype=torch.int32).repeat_interleave(i.K)
    stream = torch.cuda.current_stream().cuda_stream

    def forward() -> Tensor:
        out_TD, _ = moe_general_routing_inputs(
            i.x_TD, i.weight_TK.flatten(), token_N, i.expert_TK.flatten(), in_turn.permute(1, 2, 0), None,
            w_down.permute(1, 2, 0), None, i.E, stream, ActivationType.SWIGLU)
        return out_TD

    def gradients(dx, din_turn, ddown, dweight):
        return dx, din_turn.view(i.E, i.F, 2, i.D).transpose(1, 2).reshape(i.E, 2 * i.F, i.D), ddown, dweight

    return i.step(forward, (i.x_TD, in_turn, w_down, i.weight_TK), gradients)


def megablocks(i: Inputs) -> Step:
    """Its dropless experts with grouped products; the sparse ones refuse this triton. Matrices are [E F, D] each."""
    try:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import ParallelDroplessMLP
    except ImportError as error:
        raise NotAvailable("megablocks is not installed") from error
    module = ParallelDroplessMLP(Arguments(
        hidden_size=i.D, ffn_hidden_size=i.F, moe_num_experts=i.E, moe_top_k=i.K, mlp_type="glu", mlp_impl="grouped",
        activation_fn=F.silu, bias=False, return_bias=False, moe_loss_weight=0.0,
        fp16=i.x_TD.dtype == torch.float16, bf16=i.x_TD.dtype == torch.bfloat16, device=torch.device(i.device)))
    gate, up = i.w_gate_up.detach().chunk(2, dim=1)
    for name, w in (("w1", gate), ("v1", up), ("w2", i.w_down.detach().mT)):
        getattr(module.mlp, name).data = w.reshape(i.E * i.F, i.D).contiguous()
    leaves = (i.x_TD, module.mlp.w1, module.mlp.v1, module.mlp.w2, i.weight_TK)

    def forward() -> Tensor:
        return module(i.x_TD[:, None], None, i.weight_TK.to(i.x_TD.dtype), i.expert_TK)[:, 0]

    def gradients(dx, dgate, dup, ddown, dweight):
        halves = torch.cat([d.view(i.E, i.F, i.D) for d in (dgate, dup)], dim=1)
        return dx, halves, ddown.view(i.E, i.F, i.D).mT, dweight

    return i.step(forward, leaves, gradients)


if __name__ == "__main__":
    raise SystemExit(main())
