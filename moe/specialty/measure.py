"""Measuring a merged model on one domain's held-out text. It runs where that text lies; only numbers leave.

What is measured, and the claim it belongs to:
    bits per byte under the anchor, the merge, and the merge without each owner      gain, public text kept, removal
    logits of every subset of owners, masked against merged anew, compared bit by bit          opt-out is exact
    which expert the router prefers, by layer                                                  purity, win rate
"""

import copy
import random
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor

from moe.config import ANCHOR_SLOT, MOST_SUBSETS, PUBLIC, SpecialtyConfig
from moe.data.loader import Batch, whole_documents
from moe.data.shards import PackedDocuments
from moe.data.tokenizer import identity
from moe.eval.bits import bits_per_byte
from moe.hf import folder as model_folder
from moe.hf.folder import ModelFolder
from moe.model import Decoder, Output
from moe.run_folder import RunFolder
from moe.specialty.merge import opt_out


@torch.no_grad()
def measure_domain(config: SpecialtyConfig, run: RunFolder, domain: str) -> dict[str, Any]:
    """Every figure that needs this domain's held-out text; plain values."""
    anchor, merged = model_folder.load(run.anchor), model_folder.load(run.model)
    held_out = PackedDocuments(run.shards(domain, "eval"), identity(merged.tokenizer, merged.special))
    limit, owners = config.evaluation.tokens, merged.owners
    routing = RoutingShares(merged)
    figures: dict[str, Any] = {
        "anchor_bpb": bits_per_byte(anchor.decoder, held_out, limit),
        "merged_bpb": bits_per_byte(merged.decoder, held_out, limit, routing.observe),
        "without_bpb": {},
        **routing.figures(domain),
    }
    for owner in owners:
        merged.decoder.use(slot for slot in merged.decoder.slots if slot != owners[owner])
        figures["without_bpb"][owner] = bits_per_byte(merged.decoder, held_out, limit)
    if domain != PUBLIC:
        merged.decoder.use([ANCHOR_SLOT, owners[domain]])
        figures["pack_bpb"] = bits_per_byte(merged.decoder, held_out, limit)
    merged.decoder.use(merged.decoder.slots)
    batches = whole_documents(held_out, config.model.context_length, config.evaluation.optout_tokens, None)
    figures["optout"] = compare_subsets(anchor, merged, next(batches)[0])
    return figures


class RoutingShares:
    """Sums, over batches, of what the routers of a merged model prefer."""

    def __init__(self, merged: ModelFolder):
        self._names = {ANCHOR_SLOT: "anchor", **{slot: name for name, slot in merged.owners.items()}}
        layers, slots = len(merged.decoder.layers), merged.decoder.config.num_slots
        self._weight_LS = torch.zeros(layers, slots, dtype=torch.float64)  # routing weight each expert got
        self._best_LS = torch.zeros(layers, slots, dtype=torch.float64)  # tokens whose best owner it was
        self._wins_LS = torch.zeros(layers, slots, dtype=torch.float64)  # tokens on which it outranked the anchor
        self._tokens = 0

    def observe(self, output: Output) -> None:
        for layer, route in enumerate(output.routes):
            slots = route.logits_TS.shape[1]
            chosen_TS = torch.zeros_like(route.logits_TS).scatter(1, route.slot_TK.long(), route.weight_TK)
            self._weight_LS[layer] += chosen_TS.double().sum(dim=0)
            owners_TS = route.logits_TS.clone()
            owners_TS[:, ANCHOR_SLOT] = -torch.inf
            self._best_LS[layer] += torch.bincount(owners_TS.argmax(dim=1), minlength=slots)
            self._wins_LS[layer] += (owners_TS > route.logits_TS[:, [ANCHOR_SLOT]]).sum(dim=0)
        self._tokens += output.hidden_TD.shape[0]

    def figures(self, domain: str) -> dict[str, Any]:
        """Shares of tokens, the mean over layers and each layer's own. `purity` is the share whose best expert beside
        the anchor is the domain's own."""
        own = next((slot for slot, name in self._names.items() if name == domain), None)
        figures: dict[str, Any] = {
            "share": self._by_name(self._weight_LS.mean(dim=0)),
            "share_by_layer": [self._by_name(row) for row in self._weight_LS],
            "win_rate": self._by_name(self._wins_LS.mean(dim=0)),
        }
        if own is not None:
            figures["purity"] = float(self._best_LS[:, own].mean()) / self._tokens
            figures["purity_by_layer"] = (self._best_LS[:, own] / self._tokens).tolist()
        return figures

    def _by_name(self, count_S: Tensor) -> dict[str, float]:
        return {name: float(count_S[slot]) / self._tokens for slot, name in self._names.items()}


def compare_subsets(anchor: ModelFolder, merged: ModelFolder, batch: Batch) -> dict[str, Any]:
    """For every subset of owners, in float32 and bfloat16: are the logits with the others masked equal, bit for bit,
    to those of a model in which they never were? And would a router with a table of as many rows as experts differ?"""
    owners = merged.owners
    subsets = list(chain.from_iterable(combinations(owners, n) for n in range(len(owners) + 1)))
    if len(subsets) > MOST_SUBSETS:  # nobody and everybody, and a sample of the others
        subsets = [subsets[0], *random.Random(0).sample(subsets[1:-1], MOST_SUBSETS - 2), subsets[-1]]
    all_equal, plain_differs = True, False
    for dtype in (torch.float32, torch.bfloat16):
        anchor, merged = _in(anchor, dtype), _in(merged, dtype)
        for subset in subsets:
            never = opt_out(merged, owners.keys() - set(subset))
            merged.decoder.use([ANCHOR_SLOT, *(owners[name] for name in subset)])
            masked_TV = _logits(merged.decoder, batch)
            all_equal &= torch.equal(masked_TV, _logits(never.decoder, batch))
            if not subset:
                all_equal &= torch.equal(masked_TV, _logits(anchor.decoder, batch))
            plain_differs |= _plain_router_differs(merged, subset, batch)
    return {
        "subsets": len(subsets),
        "bitwise_equal": all_equal,
        "plain_router_differs": plain_differs,
    }


def _in(model: ModelFolder, dtype: torch.dtype) -> ModelFolder:
    """A copy with weights of `dtype`."""
    return replace(model, decoder=copy.deepcopy(model.decoder).cast(dtype))


def _logits(model: Decoder, batch: Batch) -> Tensor:
    return model(batch.token_T, batch.documents).hidden_TD @ model.head_weight.T


def _plain_router_differs(merged: ModelFolder, subset: tuple[str, ...], batch: Batch) -> bool:
    """Whether dropping rows from the first layer's product, instead of masking them, changes a bit of what stays."""
    decoder, first = merged.decoder, merged.decoder.layers[0]
    _, normed_TD = first.attend(decoder.embedding(batch.token_T), decoder.context(batch.documents))
    x_TD = normed_TD.float()
    table_SD = first.ffn.router.table.float()
    everybody = list(merged.decoder.slots)
    stay = [ANCHOR_SLOT, *sorted(merged.owners[name] for name in subset)]
    places = [everybody.index(slot) for slot in stay]
    return not torch.equal((x_TD @ table_SD[everybody].T)[:, places], x_TD @ table_SD[stay].T)
