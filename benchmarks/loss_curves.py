"""Does training with the fast ops follow training with the plain equations? The same run under both, step by step.

    python -m benchmarks.loss_curves runs/quickstart

A mixture of the run's own size, four experts a layer, learns the run's public text for 200 updates from the same
weights and in the same order: with the plain equations (kernels.reference) and with this device's fast ops, in float32
and in bfloat16 (float32 masters). Every step's loss goes to benchmarks/results/loss_curves.jsonl, the plot beside it
to loss_curves.png: above the four curves, below what the fast ops change, next to what bfloat16 alone changes.
"""

import argparse
import copy
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import harness
from benchmarks.records import record
from moe.config import PUBLIC, BalanceConfig, SpecialtyConfig
from moe.config_file import load
from moe.data import tokenizer
from moe.data.loader import Loader, Source
from moe.data.shards import PackedDocuments
from moe.model import Decoder
from moe.run_folder import RunFolder
from moe.train.balance import Balance
from moe.train.objective import next_token, token_weights
from moe.train.schedule import warmup_cosine

RESULTS = Path(__file__).parent / "results"
NUM_EXPERTS = 4
BATCH_SIZE = 2  # sequences: the plain attention holds scores of all tokens with all
DTYPES = (torch.float32, torch.bfloat16)
Z_LOSS_WEIGHT, WARMUP_STEPS = 1e-3, 20
LAST = 50  # steps over which the end of a curve is averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    run, device = RunFolder(options.run), "cuda" if torch.cuda.is_available() else "cpu"
    fast = harness.ours(device)[0]
    losses: dict[tuple[str, str], list[float]] = {}
    with Progress() as progress:
        for dtype in DTYPES:
            for name in ("reference", fast):
                curve = losses[name, harness.name_of(dtype)] = []
                task = progress.add_task(f"{name}, {harness.name_of(dtype)}", total=options.steps)
                for loss in train(load(run.config), run, name, dtype, device, options.steps):
                    curve.append(loss)
                    progress.advance(task)
    for (name, dtype), curve in losses.items():
        record(RESULTS / "loss_curves.jsonl", run, backend=name, dtype=dtype, losses=curve)
    plot(losses, fast).savefig(RESULTS / "loss_curves.png", dpi=130)
    Console().print(summary(losses, fast))


def train(config: SpecialtyConfig, run: RunFolder, name: str, dtype: torch.dtype, device: str, steps: int):
    """The loss of every update, under one backend."""
    tokens = tokenizer.load(run.tokenizer)
    section = config.anchor
    masters = Decoder(config.model, tokens.get_vocab_size(), range(NUM_EXPERTS)).initialise(config.run.seed).to(device)
    model = copy.deepcopy(masters).cast(dtype)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=section.learning_rate, betas=(section.beta1, section.beta2),
                                  weight_decay=section.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, steps, WARMUP_STEPS, section.final_learning_rate_share))
    text = PackedDocuments(run.shards(PUBLIC, "train"), tokenizer.identity(tokens))
    balance = Balance(model, BalanceConfig(method="none", z_loss_weight=Z_LOSS_WEIGHT))
    loader = Loader(Source(text, config.model.context_length, config.run.seed), BATCH_SIZE, BATCH_SIZE)
    for _ in range(steps):
        (batch,) = loader.micro_batches()
        batch = batch.to(torch.device(device))
        with harness.forced(name):
            output = model(batch.token_T, batch.documents, label_T=batch.label_T, weight_T=token_weights(batch))
            parts = next_token(output, batch, balance)
            parts.total.backward()
        update(masters, model, optimizer, section.clip)
        schedule.step()
        yield (parts.nll_sum / parts.num_labels).item()


def update(masters: Decoder, model: Decoder, optimizer: torch.optim.Optimizer, clip: float) -> None:
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))
    for master, parameter in pairs:
        master.grad, parameter.grad = gradient(parameter), None
    torch.nn.utils.clip_grad_norm_(masters.parameters(), clip)
    optimizer.step()
    for master, parameter in pairs:
        parameter.data.copy_(master)


def gradient(parameter: Tensor) -> Tensor | None:
    return None if parameter.grad is None else parameter.grad.float()


def off(losses: dict, name: str, dtype: str) -> Tensor:
    """What a backend and a dtype change: each step's loss against the plain equations' in float32."""
    return torch.tensor(losses[name, dtype]) - torch.tensor(losses["reference", "float32"])


def summary(losses: dict[tuple[str, str], list[float]], fast: str) -> Table:
    made = Table(title=f"{len(losses[fast, 'float32'])} updates")
    for heading in ("ops", "dtype", f"mean of the last {LAST}, nats", "largest step's difference", "mean difference"):
        made.add_column(heading, justify="right" if "nats" in heading or "difference" in heading else "left")
    for name, dtype in losses:
        change = off(losses, name, dtype)
        end = torch.tensor(losses[name, dtype][-LAST:]).mean().item()
        made.add_row(name, dtype, f"{end:.4f}", f"{change.abs().max().item():.1e}", f"{change.mean().item():+.1e}")
    return made


def plot(losses: dict[tuple[str, str], list[float]], fast: str) -> Figure:
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                                "grid.linewidth": 0.5, "legend.frameon": False, "font.size": 10}):
        figure = Figure(figsize=(7.5, 6.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        styles = {("reference", "float32"): ("black", "-", 3.5, 0.35),
                  ("reference", "bfloat16"): ("tab:orange", "-", 3.5, 0.35),
                  (fast, "float32"): ("tab:blue", "-", 1.2, 1),
                  (fast, "bfloat16"): ("tab:red", "--", 1.2, 1)}
        for (name, dtype), (color, line, width, alpha) in styles.items():
            label = f"{'plain equations' if name == 'reference' else f'{fast} backend'}, {dtype}"
            steps = range(1, len(losses[name, dtype]) + 1)
            above.plot(steps, losses[name, dtype], color=color, ls=line, lw=width, alpha=alpha, label=label)
            if (name, dtype) != ("reference", "float32"):
                below.plot(steps, off(losses, name, dtype), color=color, ls=line, lw=width, alpha=alpha, label=label)
        above.set_ylabel("training loss, nats per token")
        below.set_ylabel("minus plain float32")
        below.set_xlabel("update")
        above.legend()
        figure.suptitle("One training run under the plain equations and under the fast ops")
    return figure


if __name__ == "__main__":
    main()
