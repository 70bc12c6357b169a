"""Time a whole training step, tokens in to weights updated, against transformers' Qwen3-MoE with the same weights.

    python -m benchmarks.bench_train_step --threads 2 --out benchmarks/results/train_step.jsonl
    python -m benchmarks.bench_train_step --dtypes bfloat16 --shapes 8,512,256,640,4,4,2,8,2,8192 --where

A point is B sequences of L tokens through M layers of width D with H query and G key heads and E experts of width F, of
which a token uses K, and a vocabulary of V; embedding and head share their weights, queries and keys are normed. A step
is forward, loss, backward, torch's fused AdamW and clearing the gradients. Peers are transformers' attention (sdpa,
eager) with its experts (eager, grouped_mm). The loss of the first step and the norms of its gradients are held against
transformers' own in float32. All of it runs with the allocator's settings of training on a CPU
(moe/train/allocator.py), for which the process starts itself once more. FLOPs are 6 for each parameter that a token
uses, without attention's own products.

--where adds a table of where one of our steps spends its time, by op, forward and backward together.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import kernels
from benchmarks import command, harness
from benchmarks.against import against
from benchmarks.harness import NotAvailable, Point, Provider, Step
from benchmarks.tables import Row, table
from moe.config import BalanceConfig, ModelConfig
from moe.data.loader import IGNORED, Batch
from moe.model import Decoder
from moe.train import allocator
from moe.train.balance import Balance
from moe.train.flops import training_flops_per_token
from moe.train.objective import next_token, token_weights

LETTERS = "BLDFMHGEKV"
SHAPES = {
    "cpu": [(8, 512, 256, 640, 4, 4, 2, 8, 2, 8192), (8, 512, 512, 1280, 8, 8, 4, 8, 2, 8192)],  # 18.6 M, 136 M
    "cuda": [(8, 512, 256, 640, 4, 4, 2, 8, 2, 8192), (8, 512, 512, 1280, 8, 8, 4, 8, 2, 8192),
             (8, 4096, 2048, 768, 4, 32, 4, 64, 8, 32768)],
}
LEARNING_RATE = 1e-4
ROUTER_STD = 0.1  # of the initial routers: large enough that equal weights choose equal experts in any dtype
# Of the table of --where: the profiler's names of what belongs to an op. What is in none is "other".
PARTS = {
    "experts": ("_Experts",),
    "attention": ("_Attention",),
    "loss": ("_LinearCrossEntropy",),
    "projections": ("aten::linear", "MmBackward", "AddmmBackward"),
    "norms": ("_Norm",),
    "rope": ("_Rope",),
    "router": ("_Route",),
    "optimizer": ("Optimizer.step",),
}


@dataclass(frozen=True)
class TrainStep(Step):
    """`both` is the whole step, with the optimizer's update in it."""

    update: Callable[[], None] = lambda: None

    def both(self) -> tuple[Tensor, ...]:
        with harness.forced(self.backend):
            (loss,) = self.function()
            loss.backward()
            gradients = tuple(leaf.grad for leaf in self.leaves)
            self.update()
        return loss.detach(), *gradients


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__, "bench_train_step", ",".join(LETTERS))
    parser.add_argument("--where", action="store_true", help="where one of our steps spends its time")
    parser.set_defaults(passes=["step"])
    options = parser.parse_args(arguments)
    if options.where and options.device != "cpu":
        parser.error("--where counts the processor's time: want it with --device cpu")
    settings = replace(command.settings_of(options), passes=("step",))
    points = [point_of(shape, dtype, options.device)
              for shape in command.shapes_of(options, LETTERS, SHAPES[options.device])
              for dtype in command.dtypes_of(options)][options.skip:]

    def build(point: Point) -> tuple[Provider, Sequence[Provider]]:
        exact = replace(point, dtype=torch.float32)
        oracle = Provider("reference", lambda: transformers(exact, "sdpa", "eager"))
        return oracle, command.wanted(providers(point), options)

    rows = harness.run(points, build, settings)
    against(rows, points, settings, "transformers")
    for point in points if options.where else ():
        parts = where(ours(point, harness.ours(point.device)[0]))
        print(f"\nwhere {harness.title(point)} spends its time\n{table(parts, WHERE)}")
    return harness.status_of(rows)


def point_of(shape: dict[str, int], dtype: torch.dtype, device: str) -> Point:
    with torch.device("meta"):
        model = Decoder(config_of(shape), shape["V"], range(shape["E"]))
    flops = training_flops_per_token(model) * shape["B"] * shape["L"]
    return Point("train_step", shape, dtype, device, flops={"step": flops})


def config_of(shape: dict[str, int]) -> ModelConfig:
    return ModelConfig(d_model=shape["D"], num_layers=shape["M"], num_heads=shape["H"], num_kv_heads=shape["G"],
                       d_ff=shape["F"], context_length=shape["L"], num_slots=shape["E"], top_k=shape["K"])


def decoder_of(point: Point) -> Decoder:
    """The model all providers start from."""
    shape = point.shape
    model = Decoder(config_of(shape), shape["V"], range(shape["E"])).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for layer in model.layers:
        layer.ffn.router.table.data.normal_(0, ROUTER_STD, generator=generator)
    return model


def batch_of(point: Point) -> Batch:
    B, L, V = (point.shape[letter] for letter in "BLV")
    token_T = torch.randint(V, (B * L,), generator=torch.Generator().manual_seed(2))
    label_T = token_T.roll(-1)
    label_T[L - 1::L] = IGNORED
    documents = kernels.documents(range(0, B * L + 1, L))
    return Batch(token_T, label_T, documents, ()).to(torch.device(point.device))


def providers(point: Point) -> list[Provider]:
    own = [Provider(f"kernels ({name})", lambda name=name: ours(point, name)) for name in harness.ours(point.device)]
    peers = [Provider(f"transformers {attention} {experts}",
                      lambda attention=attention, experts=experts: transformers(point, attention, experts))
             for attention in ("sdpa", "eager") for experts in ("eager", "grouped_mm")]
    return own + peers


def ours(point: Point, backend: str) -> TrainStep:
    model, batch = decoder_of(point).cast(point.dtype).to(point.device), batch_of(point)

    balance = Balance(model, BalanceConfig(method="none", z_loss_weight=0.0))

    def loss() -> tuple[Tensor]:
        output = model(batch.token_T, batch.documents, label_T=batch.label_T, weight_T=token_weights(batch))
        return (next_token(output, batch, balance).total,)

    first, last = model.layers[0], model.layers[-1]
    leaves = (model.embedding.weight, first.attention.q_proj.weight, first.ffn.router.table, last.ffn.experts.w_down)
    return step(model, loss, leaves, backend)


def transformers(point: Point, attention: str, experts: str) -> TrainStep:
    try:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    except ImportError as error:
        raise NotAvailable("transformers with Qwen3-MoE is not installed") from error
    shape, own = point.shape, config_of(point.shape)
    config = Qwen3MoeConfig(
        vocab_size=shape["V"], hidden_size=own.d_model, num_hidden_layers=own.num_layers, head_dim=own.head_size,
        num_attention_heads=own.num_heads, num_key_value_heads=own.num_kv_heads, moe_intermediate_size=own.d_ff,
        num_experts=shape["E"], num_experts_per_tok=own.top_k, norm_topk_prob=True, tie_word_embeddings=True,
        max_position_embeddings=own.context_length, rms_norm_eps=own.norm_eps, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": own.rope_theta}, attn_implementation=attention,
        experts_implementation=experts)
    model = Qwen3MoeForCausalLM(config)
    model.load_state_dict(renamed(decoder_of(point)))
    model.to(point.device, point.dtype)
    batch = batch_of(point)
    token_BL = batch.token_T.view(shape["B"], shape["L"])
    # Ours is the mean over all tokens, theirs over those with a label, of which each sequence has one less.
    share = (shape["L"] - 1) / shape["L"]

    def loss() -> tuple[Tensor]:
        return (model(input_ids=token_BL, labels=token_BL).loss * share,)

    first, last = model.model.layers[0], model.model.layers[-1]
    leaves = (model.model.embed_tokens.weight, first.self_attn.q_proj.weight, first.mlp.gate.weight,
              last.mlp.experts.down_proj)
    return step(model, loss, leaves)


def renamed(decoder: Decoder) -> dict[str, Tensor]:
    """Our weights under transformers' names."""
    names = {"embedding": "model.embed_tokens", "norm": "model.norm", "attention_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm", "attention": "self_attn", "layers": "model.layers", "ffn": "mlp",
             "router": "gate", "table": "weight", "w_gate_up": "gate_up_proj", "w_down": "down_proj"}
    state = {".".join(names.get(part, part) for part in name.split(".")): tensor
             for name, tensor in decoder.state_dict().items() if not name.endswith("router.bias")}
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def step(model: nn.Module, loss: Callable[[], tuple[Tensor]], leaves: tuple[Tensor, ...],
         backend: str = "") -> TrainStep:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def named(found: Sequence[Tensor]) -> dict[str, Tensor]:
        norms = dict(zip(("embedding", "q", "router", "down"), (g.float().norm() for g in found[1:]), strict=True))
        return {"loss": found[0], **norms}

    return TrainStep(loss, leaves, (), named, backend, update)


WHERE = (("part", "part", "{}"), ("ms", "ms", "{:.1f}"), ("share", "share", "{:.0%}"))


def where(step: TrainStep) -> list[Row]:
    """Milliseconds of each part of one step, and its share of all."""
    for _ in range(2):
        step.both()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step.both()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events) / 1e3
    found = {part: sum(event.cpu_time_total for event in events if event.key.startswith(prefixes)) / 1e3
             for part, prefixes in PARTS.items()}
    found["other"] = total - sum(found.values())
    return [{"part": part, "ms": ms, "share": ms / total} for part, ms in found.items()] + [
        {"part": "all", "ms": total, "share": 1.0}]


if __name__ == "__main__":
    if not allocator.ENVIRONMENT.keys() <= os.environ.keys():  # read when a process starts
        again = [sys.executable, "-m", "benchmarks.bench_train_step", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | allocator.ENVIRONMENT)
    raise SystemExit(main())
