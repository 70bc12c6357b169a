"""How far launch.plan is from training runs that others have published.

    python -m benchmarks.published_runs          # a table: published and planned tokens/s of a GPU, and the error
    python -m benchmarks.published_runs --fit    # what SUSTAINED of launch/plan/rates.py would be, from the fitted runs

The inputs of each run, their sources, and what had to be assumed lie in benchmarks/results/published_runs.yaml. No
constant is fitted to one run: SUSTAINED has one for each generation of devices, fitted to the runs marked so, and the
others are held out. Other people's kernels are not ours: this tests the arithmetic of work and traffic, and what the
published shares of a device's peak are worth, not what our kernels reach.

Tensor and pipeline parallelism, which we do not have, are modelled here as far as the comparison needs them: a rank
computes its share of every product, tensor parallelism moves each layer's input four times in the forward and backward,
and a pipeline with p stages, v virtual ones on each rank and m micro-batches idles for (p - 1) / (v m) of its work.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from launch.plan import rates
from launch.plan.cluster import Cluster, Link
from launch.plan.layout import Layout
from launch.plan.shape import Shape
from launch.plan.step import LINK, Step, step

RESULTS = Path(__file__).parent / "results" / "published_runs.yaml"
NEAR = 0.15


@dataclass(frozen=True)
class Run:
    name: str
    fitted: bool
    address: str
    assumed: tuple[str, ...]
    shape: Shape
    cluster: Cluster
    layout: Layout
    published: float  # tokens a second of a GPU
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1

    def planned(self) -> float:
        """Tokens a second of a GPU."""
        own = self._step()
        if self.tensor * self.pipeline == 1:
            return own.tokens_per_s / self.cluster.gpus
        layout = self.layout
        parts = own.parts
        computing = sum(seconds for kind, seconds in parts.items() if kind not in ("gradients", "weights", "optimizer"))
        moved = 2 * layout.tokens * self.shape.d_model * (self.tensor - 1) / self.tensor
        trips = 8 * self.shape.num_layers * layout.accumulation  # 4 pairs of all-gather and reduce-scatter
        tensor_s = trips * moved / (1e9 * LINK * self.cluster.node_link.gb_per_s)
        share = self.tensor * self.pipeline  # of weights, gradients and state too, which travel over fewer ranks
        rest = sum(parts[kind] for kind in ("gradients", "weights", "optimizer")) / share
        stage = computing / share + tensor_s / self.pipeline
        bubble = (self.pipeline - 1) / (self.virtual * layout.accumulation)
        seconds = stage * (1 + bubble) + rest
        return layout.tokens * layout.accumulation / seconds / share

    def error(self) -> float:
        return self.planned() / self.published - 1

    def _step(self) -> Step:
        # Tensor parallelism takes up a node's links: the ranks that share gradients are so many fewer on each.
        inside = self.cluster.gpus_per_node // self.tensor
        spread = self.cluster.model_copy(update={"gpus_per_node": inside, "nodes": self.cluster.gpus // inside})
        return step(self.shape, self.layout, spread)


def read(path: Path = RESULTS) -> list[Run]:
    return [_run(values) for values in yaml.safe_load(path.read_text())["runs"]]


def _run(values: dict[str, Any]) -> Run:
    where, layout = dict(values["cluster"]), dict(values["layout"])
    links = {key: Link(gb_per_s=float(where.pop(key))) for key in ("node_link", "network")}
    cluster = Cluster(name=values["name"], **links, **where)
    extra = {key: layout.pop(key) for key in ("tensor", "pipeline", "virtual") if key in layout}
    workers = cluster.gpus // (extra.get("tensor", 1) * extra.get("pipeline", 1))
    made = Layout(workers=workers, zero_stage=1 if extra else 3, overlap=True, all_reduce=False, **layout)
    return Run(values["name"], values["fitted"], values["address"], tuple(values["assumed"]), shape_of(values["model"]),
               cluster, made, values["tokens_per_s_per_gpu"], **extra)


def shape_of(model: dict[str, Any]) -> Shape:
    """From widths alone: others' models have heads and embeddings that our config has no keys for."""
    model = {"matrices": 3, "d_ff": 0, **model}
    D, layers, V = model["d_model"], model["num_layers"], model["vocab_size"]
    attention = D * model["head_size"] * 2 * (model["num_heads"] + model["num_kv_heads"])
    experts = model.get("num_experts", 0)
    network = experts * D if experts else model["matrices"] * D * model["d_ff"]
    tied = model.pop("tied")
    return Shape(**model, dense_layers=0 if experts else layers,
                 rest_parameters=layers * (attention + network + 2 * D) + V * D * (1 if tied else 2),
                 lookup_parameters=0 if tied else V * D,
                 expert_parameters=layers * experts * model["matrices"] * D * model.get("expert_d_ff", 0))


def fit(runs: list[Run]) -> dict[str, float]:
    """Of each generation: the constant at which the mean of the logarithms of planned over published is 0."""
    found = {}
    for generation in rates.FITTED:
        chosen = [run for run in runs if run.fitted and run.cluster.kind.generation == generation]
        low, high = 0.3, 1.5
        for _ in range(40):
            rates.SUSTAINED[generation] = middle = (low + high) / 2
            mean = sum(math.log(run.planned() / run.published) for run in chosen)
            low, high = (low, middle) if mean > 0 else (middle, high)
        found[generation] = middle
    return found


def table(runs: list[Run]) -> Table:
    shown = Table("run", "GPUs", "published", "planned", "error", "", title="tokens/s of a GPU")
    for run in sorted(runs, key=lambda run: not run.fitted):
        shown.add_row(run.name, str(run.cluster.gpus), f"{run.published:,.0f}", f"{run.planned():,.0f}",
                      f"{run.error():+.1%}", "fitted" if run.fitted else "held out" + " (partly assumed)" *
                      bool(run.assumed))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    runs, console = read(), Console()
    if options.fit:
        console.print(fit(runs))
    console.print(table(runs))
    held = [run for run in runs if not run.fitted]
    near = sum(abs(run.error()) <= NEAR for run in held)
    console.print(f"{len(rates.FITTED)} constants fitted to {len(runs) - len(held)} runs; of {len(held)} held out, "
                  f"{near} are within {NEAR:.0%}")


if __name__ == "__main__":
    main()
