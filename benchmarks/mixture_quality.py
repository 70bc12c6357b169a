"""Is a mixture better than a dense model that costs as much, and does each balancing method balance it?

    python -m benchmarks.mixture_quality runs/quickstart

A small mixture under each method of `balance.method`, and its dense twin of equal flops per token, the router counted.
All learn the text of all the run's domains from scratch in float32: the same batches in the same order, for as many
updates. Of each: bits per byte of held-out text; the largest violation of any layer (moe.train.routing) over the last
updates, their mean, and on held-out text; the most idle experts of a layer. One JSON line for each model goes to
benchmarks/results/mixture_quality.jsonl, the plot beside it to mixture_quality.png: above by how much the loss differs
from the dense twin's on the same batches, below the violation, update by update. It is one seed: differences of some
thousandths of a bit mean nothing.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import records
from moe.config import BalanceConfig, MixtureConfig, ModelConfig
from moe.config_file import load
from moe.data import tokenizer
from moe.data.loader import Loader, Source
from moe.data.prepare import domains
from moe.data.shards import PackedDocuments
from moe.eval.bits import count_bits
from moe.model import Decoder
from moe.run_folder import RunFolder
from moe.train import routing
from moe.train.balance import Balance
from moe.train.flops import training_flops_per_token
from moe.train.objective import next_token, token_weights
from moe.train.routing import Tally
from moe.train.schedule import warmup_cosine

RESULTS = Path(__file__).parent / "results"
WIDTHS = dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2)
MIXTURE = MixtureConfig(num_experts=8, top_k=2, d_ff=192)
# Five and ten times the defaults: these few hundred updates at a high rate have to balance what long runs have
# thousands for. In the first of them hidden states are much alike, and every layer sends all to a few experts.
METHODS = {method: BalanceConfig(method=method, weight=0.05, bias_step=0.01)
           for method in ("none", "micro_batch", "sequence", "global", "bias")}
DENSE = "dense"
BATCH_SIZE, MICRO_BATCH_SIZE = 8, 4  # sequences: two micro-batches, so that a batch is not a micro-batch
LEARNING_RATE, WARMUP_STEPS, FINAL_SHARE, WEIGHT_DECAY, CLIP = 2e-3, 30, 0.1, 0.1, 1.0
LAST = 50  # updates over which the end of a run is averaged
HELD_OUT_TOKENS = 16384  # of each domain
SMOOTH, SMOOTH_MORE = 10, 50  # updates over which the plot averages violations, and differences between losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=RESULTS / "mixture_quality.jsonl")
    options = parser.parse_args()
    run, device = RunFolder(options.run), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with Progress() as progress:
        for name in (DENSE, *METHODS):
            task = progress.add_task(name, total=options.steps)
            rows.append(measured(name, run, options.steps, device, lambda task=task: progress.advance(task)))
            records.append(options.out, {**records.environment(device.type), **rows[-1]})
    plot(rows).savefig(options.out.with_suffix(".png"), dpi=130)
    Console(width=110).print(summary(rows))


def model_config(name: str, context_length: int) -> ModelConfig:
    """A channel of a SwiGLU network costs three products of d_model, an expert's row in the router one."""
    d_ff = MIXTURE.top_k * MIXTURE.d_ff + MIXTURE.shared_d_ff + -(-MIXTURE.num_experts // 3)
    return ModelConfig(**WIDTHS, d_ff=d_ff, context_length=context_length, mixture=None if name == DENSE else MIXTURE)


def measured(name: str, run: RunFolder, steps: int, device: torch.device, advance) -> dict[str, Any]:
    """Train one model and say what came of it."""
    config, tokens = load(run.config), tokenizer.load(run.tokenizer)
    text = {split: {domain: PackedDocuments(run.shards(domain, split), tokenizer.identity(tokens))
                    for domain in domains(config)} for split in ("train", "eval")}
    sizes = model_config(name, config.model.context_length)
    model = Decoder(sizes, tokens.get_vocab_size()).initialise(config.run.seed).to(device)
    loader = Loader(Source(list(text["train"].values()), sizes.context_length, config.run.seed), BATCH_SIZE,
                    MICRO_BATCH_SIZE)
    updates = []
    for update in train(model, METHODS.get(name, METHODS["none"]), loader, steps):
        updates.append(update)
        advance()
    last = updates[-LAST:]
    row = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_flops_per_token": training_flops_per_token(model),
        "tokens": steps * BATCH_SIZE * sizes.context_length,
        "last_loss": sum(update["loss"] for update in last) / len(last),
        **held_out(model, text["eval"]),
        "losses": [round(update["loss"], 4) for update in updates],
    }
    if name != DENSE:
        seen = [update["routing"] for update in updates]
        row["last_violation"] = sum(one["max_violation"] for one in seen[-LAST:]) / len(last)
        row["last_idle"] = max(one["idle"] for one in seen[-LAST:])
        row["violations"] = [one["max_violation"] for one in seen]
    return row


def train(model: Decoder, config: BalanceConfig, loader: Loader, steps: int) -> Iterator[dict[str, Any]]:
    """Of every update its mean loss in nats, and where its tokens went."""
    balance = Balance(model, config, BATCH_SIZE // MICRO_BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY,
                                  fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, steps, WARMUP_STEPS, FINAL_SHARE))
    for _ in range(steps):
        optimizer.zero_grad()
        losses: list[Tensor] = []
        for batch in loader.micro_batches():
            batch = batch.to(model.embedding.weight.device)
            output = model(batch.token_T, batch.documents, label_T=batch.label_T, weight_T=token_weights(batch))
            parts = next_token(output, batch, balance)
            (parts.total * (MICRO_BATCH_SIZE / BATCH_SIZE)).backward()
            balance.add(output.routes)
            losses.append(parts.nll_sum / parts.num_labels)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        routed = balance.update(True)
        row = {"loss": torch.stack(losses).mean().item()}
        yield row if routed is None else row | {"routing": routing.row(routed.count_LS, MIXTURE.top_k)}


def held_out(model: Decoder, text: dict[str, PackedDocuments]) -> dict[str, Any]:
    """Bits per byte of every domain and of all, and where the tokens of all went."""
    tally = Tally(model) if model.routers() else None
    bits = {domain: count_bits(model, packed, HELD_OUT_TOKENS, lambda output: tally and tally.add(output.routes))
            for domain, packed in text.items()}
    row: dict[str, Any] = {
        "bpb": sum(one.total for one in bits.values()) / sum(one.num_bytes for one in bits.values()),
        "bpb_of": {domain: one.per_byte for domain, one in bits.items()},
    }
    return row if tally is None else row | {"held_out_routing": routing.row(tally.count(), MIXTURE.top_k)}


def summary(rows: list[dict[str, Any]]) -> Table:
    made = Table(title=f"{len(rows[0]['losses'])} updates, {rows[0]['tokens'] / 1e6:.2f} M tokens")
    for heading in ("model", "parameters", "held-out bpb", f"violation, last {LAST}", "held-out violation", "idle",
                    "held-out idle"):
        made.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        cells = [row["model"], f"{row['parameters'] / 1e6:.2f} M", f"{row['bpb']:.4f}"]
        if row["model"] != DENSE:
            there = row["held_out_routing"]
            cells += [f"{row['last_violation']:.2f}", f"{there['max_violation']:.2f}", str(row["last_idle"]),
                      str(there["idle"])]
        made.add_row(*cells)
    return made


def plot(rows: list[dict[str, Any]]) -> Figure:
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                                "grid.linewidth": 0.5, "legend.frameon": False, "font.size": 10}):
        figure = Figure(figsize=(7.5, 6.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for row, color in zip(rows, ("black", "tab:gray", "tab:blue", "tab:green", "tab:red", "tab:orange"),
                              strict=True):
            label = "dense, equal flops" if row["model"] == DENSE else f"mixture, {row['model']}"
            difference = [loss - dense for loss, dense in zip(row["losses"], rows[0]["losses"], strict=True)]
            above.plot(*smooth(difference, SMOOTH_MORE), color=color, lw=1.2, label=f"{label}: {row['bpb']:.3f}")
            if row["model"] != DENSE:
                below.plot(*smooth(row["violations"], SMOOTH), color=color, lw=1.2, label=row["model"])
        above.set_ylabel("training loss minus the dense twin's,\nnats per token")
        below.set_ylabel("largest violation of a layer")
        below.set_xlabel("update")
        above.legend(title="held-out bits per byte")
        figure.suptitle("A mixture and its dense twin, on the same text")
    return figure


def smooth(values: list[float], most: int) -> tuple[range, list[float]]:
    """The mean of every so many values, at the last of them."""
    size = min(most, len(values))
    means = torch.tensor(values).unfold(0, size, 1).mean(dim=1).tolist()
    return range(size, len(values) + 1), means


if __name__ == "__main__":
    main()
