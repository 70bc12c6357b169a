"""A pack: what an owner's text has taught one expert, and nothing else.

It is trained in a mixture of two, the anchor's frozen FFN and the owner's copy of it, K = 2, without any balancing
loss. Attention, norms and embedding are the anchor's and frozen too, so packs of different owners fit together. The
router is not trained but fitted (moe.specialty.triage), again and again while the expert learns.

    PACK/pack.safetensors    layers.L.w_gate_up [2F, D], layers.L.w_down [D, F], layers.L.row [D], layers.L.bias [], and
                             of each stakeholder group that it was aligned with layers.L.deltas.GROUP.PART
                             (moe.model.deltas has the parts)
    PACK/pack.json           owner, slot, H0, hashes of the data's manifests, of the training's inputs, of every tensor
"""

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kernels
from kernels import Gate, Route
from moe import manifest as manifests
from moe.config import ANCHOR_SLOT, STAKEHOLDERS, ModelConfig
from moe.errors import InputError
from moe.hashing import tensor_hash, tensor_hashes
from moe.model import Decoder, deltas
from moe.model.experts import Experts

TENSORS, MANIFEST = "pack.safetensors", "pack.json"


class PackFFN(nn.Module):
    """The layer while a pack is in training: slot 0 frozen, the owner's slot open."""

    def __init__(self, anchor: Experts, slot: int, num_slots: int):
        super().__init__()
        device = anchor.w_down.device
        self.own = copy.deepcopy(anchor).requires_grad_(True)  # step 0 is the anchor, whatever the router says
        self.anchor = anchor.requires_grad_(False)
        # Fitted, not trained: buffers are kept in checkpoints and out of the optimizer.
        self.register_buffer("row", torch.zeros(anchor.w_down.shape[1], device=device))
        self.register_buffer("bias", torch.zeros(1, device=device))
        self.slot, self.num_slots = slot, num_slots
        present_S = torch.zeros(num_slots, dtype=torch.bool, device=device)
        present_S[[ANCHOR_SLOT, slot]] = True
        self.register_buffer("present_S", present_S, persistent=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Route]:
        # Padding puts the row into its slot of a table that is zero elsewhere, the anchor's row included.
        around = (self.slot, self.num_slots - self.slot - 1)
        table_SD = nn.functional.pad(self.row[None], (0, 0, *around))
        bias_S = nn.functional.pad(self.bias, around)
        route = kernels.route(x_TD, table_SD, bias_S, self.present_S, Gate(2))
        # Every token uses both: the anchor's rows, then the owner's.
        y_ND = torch.cat([self.anchor.alone(x_TD), self.own.alone(x_TD)])
        T = x_TD.shape[0]
        row_TK = torch.arange(T, device=x_TD.device)[:, None] + T * (route.slot_TK != ANCHOR_SLOT)
        return kernels.combine(y_ND, route.weight_TK, row_TK.int()), route


def open_slot(anchor: Decoder, slot: int) -> Decoder:
    """Turn a dense anchor, in place, into the model in which an owner trains: all frozen but one new expert."""
    anchor.requires_grad_(False)
    for layer in anchor.layers:
        layer.ffn = PackFFN(layer.ffn.experts, slot, anchor.config.num_slots)
    return anchor


@dataclass(frozen=True)
class Pack:
    owner: str
    slot: int
    anchor_hash: str  # H0
    tensors: dict[str, Tensor]
    provenance: dict[str, Any]  # hashes of what it was made from

    @classmethod
    def of(cls, model: Decoder, owner: str, anchor_hash: str, provenance: dict[str, Any]) -> "Pack":
        """Take the pack out of a trained model. Experts keep the model's dtype; rows and biases are float32."""
        tensors = {}
        for number, layer in enumerate(model.layers):
            ffn = layer.ffn
            tensors[f"layers.{number}.w_gate_up"] = ffn.own.w_gate_up[0]
            tensors[f"layers.{number}.w_down"] = ffn.own.w_down[0]
            tensors[f"layers.{number}.row"] = ffn.row.float()
            tensors[f"layers.{number}.bias"] = ffn.bias[0].float()
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        return cls(owner, model.layers[0].ffn.slot, anchor_hash, tensors, provenance)

    def hashes(self) -> dict[str, str]:
        return tensor_hashes(self.tensors)

    @property
    def ranks(self) -> dict[str, int]:
        """Of the updates for stakeholder groups, by group."""
        found = {group: self.tensors.get(f"layers.0.deltas.{group}.gate_up_a") for group in STAKEHOLDERS}
        return {group: len(tensor) for group, tensor in found.items() if tensor is not None}

    def check(self, config: ModelConfig) -> None:
        """That its tensors are those of a pack for a model of these sizes. Raises InputError naming one that is not."""
        D, F = config.d_model, config.d_ff
        shapes: dict[str, tuple[int, ...]] = {"w_gate_up": (2 * F, D), "w_down": (D, F), "row": (D,), "bias": ()}
        for group, rank in self.ranks.items():
            shapes |= {f"deltas.{group}.{name}": shape for name, shape in deltas.shapes(rank, D, F).items()}
        wanted = {f"layers.{number}.{name}": list(shape) for number in range(config.num_layers)
                  for name, shape in shapes.items()}  # fmt: skip
        for name in sorted(wanted.keys() | self.tensors.keys()):
            got = list(self.tensors[name].shape) if name in self.tensors else "missing"
            if got != (want := wanted.get(name, "no such tensor")):
                raise InputError(f"pack {self.owner}: tensor {name} is {got}: want {want}")

    def save(self, folder: Path) -> None:
        temporary = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(self.tensors, temporary / TENSORS)
        manifest = {
            "schema": 1,
            "owner": self.owner,
            "slot": self.slot,
            "anchor_hash": self.anchor_hash,
            "tensors": self.hashes(),
            **self.provenance,
        }
        manifests.write(temporary / MANIFEST, manifest)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)

    @classmethod
    def load(cls, folder: Path) -> "Pack":
        """Raises InputError naming the file or the tensor that is damaged."""
        try:
            manifest = manifests.read(folder / MANIFEST)
            tensors = load_file(folder / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"pack {folder} cannot be read: {error}") from error
        hashes = manifest.pop("tensors")
        for name in sorted(hashes.keys() | tensors.keys()):
            if name not in hashes or name not in tensors or tensor_hash(tensors[name]) != hashes[name]:
                raise InputError(f"pack {folder} is damaged at tensor {name}: it does not match {MANIFEST}")
        owner, slot, anchor_hash = (manifest.pop(key) for key in ("owner", "slot", "anchor_hash"))
        return cls(owner, slot, anchor_hash, tensors, manifest)
