"""Merging packs onto their anchor, and taking one away again. Nothing is trained, nothing is averaged."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moe.config import ANCHOR_SLOT
from moe.errors import InputError
from moe.hashing import tensor_hash
from moe.hf.folder import ModelFolder, is_dense
from moe.model import Decoder
from moe.specialty.pack import Pack


def merge(anchor: ModelFolder, packs: Sequence[Pack]) -> ModelFolder:
    """Stack the packs by slot beside the anchor; without packs, a mixture of the anchor alone.

    Raises InputError naming the pack that stands on another anchor, or two packs that claim one slot."""
    if not is_dense(anchor):
        raise InputError("the anchor to merge on is a mixture already: want a dense model")
    anchor_hash, num_slots = anchor.identity(), anchor.decoder.config.num_slots
    holder: dict[int, str] = {}
    for pack in packs:
        if pack.anchor_hash != anchor_hash:
            raise InputError(
                f"pack {pack.owner} was trained on anchor {pack.anchor_hash[:12]}: want {anchor_hash[:12]}, this one"
            )
        if not ANCHOR_SLOT < pack.slot < num_slots:
            raise InputError(f"pack {pack.owner} claims slot {pack.slot}: want one from 1 to {num_slots - 1}")
        if pack.owner in holder.values():
            raise InputError(f"owner {pack.owner} has two packs, which could not leave together: want one")
        if pack.slot in holder:
            raise InputError(f"packs {holder[pack.slot]} and {pack.owner} both claim slot {pack.slot}: want one each")
        pack.check(anchor.decoder.config)
        holder[pack.slot] = pack.owner
    packs = sorted(packs, key=lambda pack: pack.slot)
    source = anchor.decoder
    ranks = {pack.slot: pack.ranks for pack in packs}
    merged = Decoder(source.config, source.embedding.num_embeddings, [ANCHOR_SLOT, *holder], ranks=ranks)
    merged.cast(source.embedding.weight.dtype)
    tensors = dict(source.state_dict())
    for number in range(len(merged.layers)):
        experts, layer = f"layers.{number}.ffn.experts", f"layers.{number}"
        for name in ("w_gate_up", "w_down"):
            owned = [pack.tensors[f"{layer}.{name}"][None] for pack in packs]
            tensors[f"{experts}.{name}"] = torch.cat([tensors[f"{experts}.{name}"], *owned])
        table = torch.zeros(source.config.num_slots, source.config.d_model)
        bias = torch.zeros(source.config.num_slots)
        for pack in packs:
            table[pack.slot] = pack.tensors[f"{layer}.row"]
            bias[pack.slot] = pack.tensors[f"{layer}.bias"]
            own = f"{layer}.deltas."
            tensors |= {f"{layer}.ffn.deltas.{pack.slot}.{name.removeprefix(own)}": tensor
                        for name, tensor in pack.tensors.items() if name.startswith(own)}  # fmt: skip
        tensors[f"{layer}.ffn.router.table"], tensors[f"{layer}.ffn.router.bias"] = table, bias
    merged.load_state_dict(tensors)
    owners = {pack.owner: pack.slot for pack in packs}
    return replace(anchor, decoder=merged, owners=owners, anchor_hash=anchor_hash)


def opt_out(model: ModelFolder, owners: Iterable[str]) -> ModelFolder:
    """The model without these owners' packs, equal bit for bit to a merge that never had them.

    Raises InputError naming an owner the model does not have."""
    leaving = set(owners)
    if unknown := leaving - model.owners.keys():
        there = ", ".join(model.owners) or "nobody"
        raise InputError(f"owner {min(unknown)} is not in the model: want some of {there}")
    stay = {name: slot for name, slot in model.owners.items() if name not in leaving}
    source = model.decoder
    ranks = {slot: source.ranks.get(slot, {}) for slot in stay.values()}
    smaller = Decoder(source.config, source.embedding.num_embeddings, [ANCHOR_SLOT, *stay.values()], ranks=ranks)
    smaller.cast(source.embedding.weight.dtype)
    kept = [source.slots.index(slot) for slot in smaller.slots]
    gone = [slot for slot in source.slots if slot not in smaller.slots]
    tensors = {}
    for name, tensor in source.state_dict().items():
        if ".experts." in name:
            tensor = tensor[kept]
        elif ".router." in name:
            tensor = tensor.clone()
            tensor[gone] = 0
        elif _delta_slot(name) in gone:
            continue
        tensors[name] = tensor
    smaller.load_state_dict(tensors)
    return replace(model, decoder=smaller, owners=stay)


def certificate(before: ModelFolder, after: ModelFolder) -> dict[str, Any]:
    """What was removed, and the hashes that show that nothing of it is left and nothing else has changed."""
    removed = {name: slot for name, slot in before.owners.items() if name not in after.owners}
    old, new = _slices(before.decoder), _slices(after.decoder)
    slots = set(removed.values())
    gone = {f"{name}[slot {slot}]": digest for (name, slot), digest in old.items() if slot in slots}
    # A slice that training left as it was copied from the anchor is the anchor's, not the owner's.
    anchors = {digest for (_, slot), digest in old.items() if slot == ANCHOR_SLOT}
    left = (set(gone.values()) & set(new.values())) - anchors
    return {
        "schema": 1,
        "anchor_hash": before.anchor_hash,
        "model_before": before.identity(),
        "model_after": after.identity(),
        "removed": removed,
        "removed_tensors": gone,
        "removed_tensors_found_after": sorted(left),
        "kept_tensors_unchanged": _without(slots, old) == _without(slots, new),
    }


Slices = dict[tuple[str, int | None], str]  # (tensor, slot; None where it belongs to all) -> hash


def _slices(decoder: Decoder) -> Slices:
    """Hashes of each expert's matrices and of their updates, of every router row and bias, vacant ones too, and of all
    shared tensors."""
    slices: Slices = {}
    for name, tensor in decoder.state_dict().items():
        if ".experts." in name:
            slices |= {(name, slot): tensor_hash(tensor[place]) for place, slot in enumerate(decoder.slots)}
        elif ".router." in name:
            slices |= {(name, slot): tensor_hash(row) for slot, row in enumerate(tensor)}
        else:
            slices[name, _delta_slot(name)] = tensor_hash(tensor)
    return slices


def _delta_slot(name: str) -> int | None:
    """Whose expert a tensor is an update of, for a stakeholder group; None where it is another tensor."""
    _, delta, rest = name.partition(".ffn.deltas.")
    return int(rest.partition(".")[0]) if delta else None


def _without(slots: set[int], slices: Slices) -> Slices:
    return {(name, slot): digest for (name, slot), digest in slices.items() if slot not in slots}
