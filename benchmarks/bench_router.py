"""Time kernels.route in every mode against plain torch and the routers of transformers.

    python -m benchmarks.bench_router --out benchmarks/results/router.jsonl

A router is bound by bandwidth: forward it reads x, which at T 16384 and D 2048 in bfloat16 is 67 MB, and writes
float32 logits; so it is compared with a copy. The backward sends a gradient into the weights alone; "losses" points
send one into the shares and the z-loss too. Ours and "torch" have the same outputs: float32 logits, counts, shares and
z-loss with the choice. "torch, choice only" and transformers compute slots and weights and no more, transformers (but
for the router of DeepSeek-V3) from logits rounded to x's dtype.

On a GPU every pass is timed twice: launched by the host, and as a replayed CUDA graph, which is the kernels' own time.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks import command, harness
from benchmarks.harness import NotAvailable, Point, Provider, Step
from kernels import Gate, reference
from kernels.testing import expert_choice

LETTERS = "TDSK"
SHAPES = {"cuda": [(16384, 2048, 128, 8), (32768, 4096, 64, 4)], "cpu": [(4096, 512, 16, 4), (4096, 1024, 64, 8)]}
MODES = ("softmax_chosen", "softmax", "softmax renormalised", "sigmoid", "sigmoid groups")


def gate_of(mode: str, K: int) -> Gate:
    if mode == "sigmoid groups":
        return Gate(K, "sigmoid", renormalise=True, num_groups=8, top_groups=max(1, min(4, K // 2)))
    score, _, more = mode.partition(" ")
    return Gate(K, score, renormalise=score == "sigmoid" or more == "renormalised")


class Inputs:
    """One point's tensors, made on its device, and a gradient for the weight of every slot."""

    def __init__(self, point: Point):
        T, D, S, K = (point.shape[letter] for letter in LETTERS)
        _, mode, *losses = point.op.split(": ")
        self.T, self.D, self.S, self.K, self.gate, self.losses = T, D, S, K, gate_of(mode, K), bool(losses)
        self.device = point.device
        self.x_TD, table_SD = routed_inputs(slots(T, S, self.gate).to(point.device), D, S, point.dtype,
                                                    point.device)
        self.table_SD = table_SD.detach().float().requires_grad_()  # a router's own parameters are float32
        self.bias_S = torch.zeros(S, device=point.device)
        self.present_S = torch.ones(S, dtype=torch.bool, device=point.device)
        self.selection_bias_S = torch.zeros(S, device=point.device) if mode == "sigmoid groups" else None
        generator = torch.Generator(point.device).manual_seed(1)
        self.dweight_TS = torch.randn(T, S, generator=generator, device=point.device) / K
        self.dshare_S = torch.randn(S, generator=generator, device=point.device)

    def step(self, function: Callable[[], tuple[Tensor, ...]], table: Tensor | None = None, backend: str = "") -> Step:
        """function: slot_TK and weight_TK, and share_S and z_loss where losses are asked for."""
        with harness.forced(backend):
            slot_TK = function()[0].long()  # the choice repeats, so what each slot is sent is known beforehand
        sent = [self.dweight_TS.gather(1, slot_TK)]
        names = ["weight", "dx", "dtable"]
        if self.losses:
            sent += [self.dshare_S, torch.ones((), device=self.device)]
            names[1:1] = ["share", "z_loss"]

        def named(got: Sequence[Tensor]) -> dict[str, Tensor]:
            weight_TS = torch.zeros(self.T, self.S, device=self.device).scatter(1, slot_TK, got[0].float())
            return dict(zip(names, (weight_TS, *got[1:]), strict=True))

        return Step(lambda: function()[1:], (self.x_TD, self.table_SD if table is None else table),
                    tuple(sent), named, backend)


def main(arguments: Sequence[str] | None = None) -> int:
    made = command.parser(__doc__, "bench_router", "T,D,S,K", modes=MODES)
    made.add_argument("--losses", action="store_true", help="also points whose gradient comes from the losses too")
    options = made.parse_args(arguments)
    settings = command.settings_of(options, graphs=options.device == "cuda")
    points = [point_of(shape, dtype, options.device, mode, losses)
              for shape in command.shapes_of(options, LETTERS, SHAPES[options.device])
              for dtype in command.dtypes_of(options) for mode in options.modes
              for losses in ((False, True) if options.losses else (False,))][options.skip:]

    def build(point: Point) -> tuple[Provider, Sequence[Provider]]:
        inputs = Inputs(point)
        return Provider("reference", lambda: ours(inputs, reference)), command.wanted(providers(inputs), options)

    return harness.status_of(harness.run(points, build, settings))


def point_of(shape: dict[str, int], dtype: torch.dtype, device: str, mode: str, losses: bool = False) -> Point:
    op = f"router: {mode}" + ": losses" * losses
    return Point(op, shape, dtype, device, flops=flops(**shape),
                 bytes_moved=bytes_moved(**shape, itemsize=dtype.itemsize))


def flops(T: int, D: int, S: int, K: int) -> dict[str, float]:
    """The product of x and the table; backward one for each of them."""
    return {"forward": 2 * T * D * S, "backward": 4 * T * D * S, "both": 6 * T * D * S}


def bytes_moved(T: int, D: int, S: int, K: int, itemsize: int) -> dict[str, float]:
    """Forward reads x and the table and writes logits, slots and weights. Backward reads all of these and the gradient
    of the weights, and writes those of x and of the table."""
    x, table, logits, chosen = T * D * itemsize, S * D * 4, T * S * 4, T * K * 8
    forward = x + table + logits + chosen
    backward = x + table + logits + chosen + T * K * 4 + x + table
    return {"forward": forward, "backward": backward, "both": forward + backward}


def slots(T: int, S: int, gate: Gate) -> Tensor:
    """slot_TK that a router with these groups can choose: as many in each of the top groups."""
    if gate.num_groups == 1:
        return expert_choice(T, gate.top_k, S)
    width, each = S // gate.num_groups, gate.top_k // gate.top_groups
    group_TG = expert_choice(T, gate.top_groups, gate.num_groups).long()
    within = expert_choice(T * gate.top_groups, each, width, seed=1).long()
    return (group_TG.reshape(-1, 1) * width + within).reshape(T, gate.top_k).int()


def routed_inputs(expert_TK: Tensor, D: int, S: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x_TD and table_SD whose logits are 1 to 2 for these slots and -1 to 0 for all others; S at most D.

    So far apart that every implementation chooses these slots, whatever it rounds: results can be compared.
    """
    generator = torch.Generator(device).manual_seed(0)
    T = expert_TK.shape[0]
    draw = {"generator": generator, "device": device, "dtype": torch.float32}
    table_SD = torch.linalg.qr(torch.randn(D, S, **draw)).Q.T.contiguous().to(dtype)  # unit rows at right angles
    logits_TS = torch.rand(T, S, **draw) - 1
    logits_TS = logits_TS.scatter_add(1, expert_TK.long(), torch.full(expert_TK.shape, 2.0, device=device))
    x_TD, table = torch.randn(T, D, **draw), table_SD.float()
    x_TD += (logits_TS - x_TD @ table.T) @ table
    return x_TD.to(dtype).requires_grad_(), table_SD.requires_grad_()


def providers(i: Inputs) -> list[Provider]:
    own = [Provider(f"kernels ({name})", lambda name=name: ours(i, kernels, name), captured=name == "triton")
           for name in harness.ours(i.device)]
    peers = [Provider("torch", lambda: in_torch(i))]
    if not i.losses:
        peers += [Provider("torch, choice only", lambda: choice_only(i)),
                  Provider("transformers", lambda: transformers(i))]
    return own + peers


def ours(i: Inputs, ops, backend: str = "") -> Step:
    def function():
        route = ops.route(i.x_TD, i.table_SD, i.bias_S, i.present_S, i.gate, i.selection_bias_S)
        return (route.slot_TK, route.weight_TK, *((route.share_S, route.z_loss) if i.losses else ()))

    return i.step(function, backend=backend)


def in_torch(i: Inputs) -> Step:
    """The outputs of kernels.route with autograd."""
    def function():
        logits_TS = F.linear(i.x_TD.float(), i.table_SD)
        score_TS, slot_TK, weight_TK = choose(logits_TS, i)
        ones_N = torch.ones(i.T * i.K, dtype=torch.int32, device=i.device)
        torch.zeros(i.S, dtype=torch.int32, device=i.device).scatter_add_(0, slot_TK.flatten(), ones_N)  # the counts
        share_S = (score_TS / score_TS.sum(dim=1, keepdim=True)).mean(dim=0)
        z_loss = logits_TS.logsumexp(dim=1).square().mean()
        return (slot_TK, weight_TK, *((share_S, z_loss) if i.losses else ()))

    return i.step(function)


def choice_only(i: Inputs) -> Step:
    def function():
        _, slot_TK, weight_TK = choose(F.linear(i.x_TD.float(), i.table_SD), i)
        return slot_TK, weight_TK

    return i.step(function)


def choose(logits_TS: Tensor, i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """score_TS, slot_TK and weight_TK by the gate; slots with the most preferred first."""
    gate = i.gate
    score_TS = logits_TS.sigmoid() if gate.score == "sigmoid" else logits_TS.softmax(dim=1)
    preference_TS = score_TS if i.selection_bias_S is None else score_TS + i.selection_bias_S
    if gate.num_groups > 1:
        preference_TGs = preference_TS.unflatten(1, (gate.num_groups, -1))
        best_TG = preference_TGs.topk(2, dim=2).values.sum(dim=2).topk(gate.top_groups, dim=1).indices
        kept_TG = torch.zeros(i.T, gate.num_groups, dtype=torch.bool, device=i.device).scatter_(1, best_TG, True)
        preference_TS = preference_TGs.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)
    slot_TK = preference_TS.topk(gate.top_k, dim=1).indices
    weight_TK = score_TS.gather(1, slot_TK)
    if gate.renormalise or gate.score == "softmax_chosen":  # one number by either name
        weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
    return score_TS, slot_TK, weight_TK * gate.scale


def transformers(i: Inputs) -> Step:
    try:
        router = _transformers_router(i)
    except ImportError as error:
        raise NotAvailable("transformers with this router is not installed") from error
    router.weight = torch.nn.Parameter(i.table_SD.detach().to(i.x_TD.dtype))

    def function():
        _, weight_TK, slot_TK = router(i.x_TD)
        return slot_TK, weight_TK

    return i.step(function, router.weight)


def _transformers_router(i: Inputs) -> torch.nn.Module:
    gate, sizes = i.gate, dict(hidden_size=i.D, num_experts_per_tok=i.K)
    if gate.num_groups > 1:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
        config = DeepseekV3Config(**sizes, n_routed_experts=i.S, n_group=gate.num_groups, topk_group=gate.top_groups,
                                  norm_topk_prob=gate.renormalise, routed_scaling_factor=gate.scale)
        return DeepseekV3TopkRouter(config).to(i.device)
    if gate.score == "sigmoid":
        raise NotAvailable("transformers has no sigmoid router without groups of its own")
    if gate.score == "softmax_chosen":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
        return MixtralTopKRouter(MixtralConfig(**sizes, num_local_experts=i.S))
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
    return Qwen3MoeTopKRouter(Qwen3MoeConfig(**sizes, num_experts=i.S, norm_topk_prob=gate.renormalise))


if __name__ == "__main__":
    raise SystemExit(main())
