"""How pure could a linear router be at best? Beside ours, one that sees all owners' text at once, which ours may not.

    python -m benchmarks.routing_ceiling runs/quickstart

For each layer of a finished run's anchor: what the router sees of training text of every owner, pooled, trains a
multinomial logistic regression; its accuracy on held-out text is the share of tokens whose best expert beside the
anchor would be the right one. `fitted` is the purity of this run's rows and biases on the same hidden states, and
`measured` is what results.json says of the merged model, whose experts change what the layers above see. The shares
are added to benchmarks/results/routing_ceiling.jsonl.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.records import record, results_of
from moe.config_file import load
from moe.data.loader import whole_documents
from moe.data.shards import PackedDocuments
from moe.hf import folder as model_folder
from moe.hf.folder import ModelFolder
from moe.run_folder import RunFolder
from moe.specialty.pack import Pack

RESULTS = Path(__file__).parent / "results/routing_ceiling.jsonl"
TOKENS = 32768  # of each owner
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 800, 8192, 3e-3, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    run = RunFolder(parser.parse_args().run)
    torch.manual_seed(0)
    anchor, owners = model_folder.load(run.anchor), list(load(run.config).owners)
    seen = {
        split: [router_inputs(anchor, PackedDocuments(run.shards(owner, split))) for owner in owners]
        for split in ("train", "eval")
    }
    packs = [Pack.load(run.pack(owner)).tensors for owner in owners]
    layers = range(len(anchor.decoder.layers))
    pooled, fitted = [], []
    for n in track(layers, "layers"):
        held_out = [layers_TD[n] for layers_TD in seen["eval"]]
        weight_SD, bias_S = pooled_classifier([layers_TD[n] for layers_TD in seen["train"]])
        pooled.append(purity(held_out, weight_SD, bias_S))
        rows_SD = torch.stack([pack[f"layers.{n}.row"] for pack in packs])
        fitted.append(purity(held_out, rows_SD, torch.stack([pack[f"layers.{n}.bias"] for pack in packs])))
    measured = results_of(run)["routing"]["purity"]
    shares = {
        owner: {
            "pooled": sum(layer[place] for layer in pooled) / len(layers),
            "fitted": sum(layer[place] for layer in fitted) / len(layers),
            "measured": measured[owner],
        }
        for place, owner in enumerate(owners)
    }
    table = Table("text", "pooled ceiling", "fitted", "measured", title="purity of routing", title_justify="left")
    for owner, of in shares.items():
        table.add_row(owner, *(f"{share:.0%}" for share in of.values()))
    Console().print(table)
    record(RESULTS, run, purity=shares)


@torch.no_grad()
def router_inputs(model: ModelFolder, packed: PackedDocuments) -> list[Tensor]:
    """What each layer's router would see of the first TOKENS tokens, float32 [T, D]."""
    seen: list[list[Tensor]] = [[] for _ in model.decoder.layers]
    hooks = [
        layer.ffn.register_forward_pre_hook(lambda _, inputs, n=n: seen[n].append(inputs[0].float()))
        for n, layer in enumerate(model.decoder.layers)
    ]
    for batch, _ in whole_documents(packed, model.decoder.config.context_length, 4096, TOKENS):
        model.decoder(batch.token_T, batch.documents)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def pooled_classifier(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Weight [S, D] and bias [S] of a multinomial logistic regression, trained by Adam."""
    x_TD, label_T = torch.cat(texts), torch.cat([torch.full((len(t),), n) for n, t in enumerate(texts)])
    classifier = torch.nn.Linear(x_TD.shape[1], len(texts))
    optimizer = torch.optim.Adam(classifier.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(STEPS):
        chosen = torch.randint(len(x_TD), (BATCH,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(classifier(x_TD[chosen]), label_T[chosen]).backward()
        optimizer.step()
    return classifier.weight.detach(), classifier.bias.detach()


def purity(texts: list[Tensor], weight_SD: Tensor, bias_S: Tensor) -> list[float]:
    """Of each owner's text, the share of tokens whose largest logit is its owner's."""
    return [((x @ weight_SD.T + bias_S).argmax(dim=1) == n).float().mean().item() for n, x in enumerate(texts)]


if __name__ == "__main__":
    main()
