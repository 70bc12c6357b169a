"""Time a whole mixture layer, router to sum, against that of transformers: the same weights, dtype and threads.

    python -m benchmarks.bench_layer --out benchmarks/results/layer.jsonl
    python -m benchmarks.bench_layer --device cpu --dtypes float32 --loads zipf

Ours is kernels.route, kernels.dispatch and kernels.experts. The peers are the mixture blocks of Mixtral and of
Qwen3-MoE, each with its experts as a loop ("eager") and as grouped products ("grouped_mm"). Their batched_mm is left
out: it copies two matrices for every routed row. Outputs and gradients of all are compared before anything is timed.

The fastest block of transformers at a point and pass is the best peer there. The last table, and those lines of the
file that have "against", tell how many times as fast ours is and which share of the peer's memory it takes. FLOPs are
those of the experts and of the router's product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from benchmarks import bench_experts, command, harness
from benchmarks.against import against
from benchmarks.bench_experts import LETTERS, LOADS, SHAPES
from benchmarks.bench_router import routed_inputs
from benchmarks.harness import NotAvailable, Point, Provider, Step
from kernels import Gate, reference

NAMES = ("out", "dx", "dtable", "dw_gate_up", "dw_down")


class Inputs(bench_experts.Inputs):
    """Tokens that are routed as the point's load says, by every router."""

    def __init__(self, point: Point):
        super().__init__(point)
        self.x_TD, self.table_SD = routed_inputs(self.expert_TK, self.D, self.E, point.dtype, point.device)
        self.bias_S = torch.zeros(self.E, device=point.device)
        self.present_S = torch.ones(self.E, dtype=torch.bool, device=point.device)

    @property
    def leaves(self):
        return self.x_TD, self.table_SD, self.w_gate_up, self.w_down

    def step(self, function, leaves=None, backend=""):
        return Step(lambda: (function(),), leaves or self.leaves, (self.dout_TD,), backend=backend,
                    named=lambda got: dict(zip(NAMES, got, strict=True)))


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, "bench_layer", "T,D,F,E,K", LOADS).parse_args(arguments)
    settings = command.settings_of(options)
    points = [point_of(shape, dtype, options.device, load)
              for shape in command.shapes_of(options, LETTERS, SHAPES[options.device])
              for load in options.loads for dtype in command.dtypes_of(options)][options.skip:]

    def build(point: Point) -> tuple[Provider, Sequence[Provider]]:
        inputs = Inputs(point)
        return Provider("reference", lambda: ours(inputs, reference)), command.wanted(providers(inputs), options)

    rows = harness.run(points, build, settings)
    against(rows, points, settings, "transformers")
    return harness.status_of(rows)


def point_of(shape: dict[str, int], dtype: torch.dtype, device: str, load: str) -> Point:
    alone = bench_experts.point_of(shape, dtype, device, load)
    return Point("layer", shape, dtype, device, load, flops=flops(**shape), own_product=alone.own_product)


def flops(T: int, D: int, F: int, E: int, K: int) -> dict[str, float]:
    """The experts, and the router's product: once forward, twice backward."""
    router = {"forward": 2 * T * D * E, "backward": 4 * T * D * E, "both": 6 * T * D * E}
    return {name: value + router[name] for name, value in bench_experts.flops(T, D, F, E, K).items()}


def providers(i: Inputs) -> list[Provider]:
    own = [Provider(f"kernels ({name})", lambda name=name: ours(i, kernels, name)) for name in harness.ours(i.device)]
    peers = [Provider(f"transformers {model} {implementation}",
                      lambda model=model, implementation=implementation: transformers(i, model, implementation))
             for model in ("mixtral", "qwen3") for implementation in ("eager", "grouped_mm")]
    return own + peers


def ours(i: Inputs, ops, backend: str = "") -> Step:
    return i.step(lambda: layer(*i.leaves, i.bias_S, i.present_S, Gate(i.K), ops=ops), backend=backend)


def layer(x_TD: Tensor, table_SD: Tensor, w_gate_up: Tensor, w_down: Tensor, bias_S: Tensor, present_S: Tensor,
          gate: Gate, expert_S: Tensor | None = None, ops=kernels) -> Tensor:
    """A mixture layer; expert_S is the expert of each slot, without it the one of the same number."""
    route = ops.route(x_TD, table_SD, bias_S, present_S, gate)
    expert_TK = route.slot_TK if expert_S is None else expert_S[route.slot_TK]
    return ops.experts(x_TD, w_gate_up, w_down, ops.dispatch(expert_TK, w_down.shape[0]), route.weight_TK)


def transformers(i: Inputs, model: str, implementation: str) -> Step:
    try:
        if model == "mixtral":
            from transformers import MixtralConfig
            from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block
            config = MixtralConfig(hidden_size=i.D, intermediate_size=i.F, num_local_experts=i.E,
                                   num_experts_per_tok=i.K)
        else:
            from transformers import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block
            config = Qwen3MoeConfig(hidden_size=i.D, moe_intermediate_size=i.F, num_experts=i.E,
                                    num_experts_per_tok=i.K, norm_topk_prob=True)
    except ImportError as error:
        raise NotAvailable(f"transformers with the block of {model} is not installed") from error
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Block(config)
    block.gate.weight = torch.nn.Parameter(i.table_SD.detach())
    block.experts.gate_up_proj = torch.nn.Parameter(i.w_gate_up.detach())
    block.experts.down_proj = torch.nn.Parameter(i.w_down.detach())
    leaves = i.x_TD, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj
    return i.step(lambda: block(i.x_TD[None])[0], leaves)


if __name__ == "__main__":
    raise SystemExit(main())
