"""A model in Hugging Face layout.

    FOLDER/config.json             the model's sections, its slots and owners, the ranks of their deltas for stakeholder
                                   groups, and the anchor's hash
    FOLDER/model.safetensors       tensors under the decoder's own names; or shards, and model.safetensors.index.json
    FOLDER/tokenizer.json, tokenizer_config.json     what AutoTokenizer reads

Written under a temporary name and renamed: whole or absent.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from moe.config import ANCHOR_SLOT, ModelConfig
from moe.data import tokenizer as tokenizers
from moe.errors import InputError
from moe.hashing import tensor_hashes
from moe.hf.source import INDEX, TENSORS, weight_files, write_tensors
from moe.manifest import value_hash
from moe.model import Decoder

MODEL_TYPE = "polyclinic"

Deltas = dict[str, dict[str, int]]  # owner -> stakeholder group -> rank of its update


@dataclass(frozen=True)
class ModelFolder:
    """What a folder holds: the decoder, the tokenizer that belongs to it, and who owns which slot."""

    decoder: Decoder
    tokenizer: Tokenizer
    owners: dict[str, int] = field(default_factory=dict)  # name -> slot
    anchor_hash: str | None = None  # H0 of the anchor a merged model stands on
    tokenizer_config: dict[str, Any] | None = None  # of a tokenizer that came with another family's model

    @property
    def special(self) -> tokenizers.Special:
        return tokenizers.special_of(self.tokenizer_config)

    def use(self, owners: Iterable[str]) -> None:
        """Route to the anchor and these owners' packs only. Raises InputError naming one that is not in the model."""
        wanted = list(owners)
        if not self.owners:
            raise InputError(f"owners {', '.join(wanted) or 'none'} cannot be chosen: want a merged model, which this "
                             "is not")
        if unknown := [name for name in wanted if name not in self.owners]:
            raise InputError(f"owner {unknown[0]} has no pack in this model: want some of {', '.join(self.owners)}")
        self.decoder.use([ANCHOR_SLOT, *(self.owners[name] for name in wanted)])

    @property
    def deltas(self) -> Deltas:
        return {name: self.decoder.ranks[slot] for name, slot in self.owners.items() if slot in self.decoder.ranks}

    def mix(self, mix: Mapping[str, float]) -> None:
        """Use so much of what each stakeholder group prefers (lambda by group; of those left out, nothing). Raises
        InputError naming a group that no pack in the model was aligned with, or a lambda that is no number."""
        groups = sorted({group for ranks in self.deltas.values() for group in ranks})
        known = f"some of {', '.join(groups)}" if groups else "none, because no pack of it has any"
        for group, weight in mix.items():
            if group not in groups:
                raise InputError(f"stakeholder group {group} is not in this model: want {known}")
            if not math.isfinite(weight):
                raise InputError(f"stakeholder group {group} has weight {weight}: want a number, such as 0.5")
        self.decoder.mix(mix)

    def identity(self) -> str:
        """Hash of every tensor, the sections and the tokenizer: H0 when this is an anchor."""
        return value_hash(
            {
                "tensors": tensor_hashes(self.decoder.state_dict()),
                "model": self.decoder.config.model_dump(mode="json"),
                "tokenizer": tokenizers.identity(self.tokenizer, self.special),
            }
        )


def save(folder: Path, model: ModelFolder) -> None:
    """In the place of one that is there. For a folder that one job at a time writes: what a job that died while it
    wrote has left is taken away by the next."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary, model)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def write(folder: Path, model: ModelFolder) -> None:
    """Into an empty folder."""
    from transformers import PreTrainedTokenizerFast  # takes seconds to import: only where a model is written

    decoder = model.decoder
    tensors = {name: tensor.cpu().contiguous() for name, tensor in decoder.state_dict().items()}
    write_tensors(tensors, folder / TENSORS)
    names = {f"{kind}_token": name for kind, name in model.special._asdict().items()}
    token_ids = {f"{key}_id": name and model.tokenizer.token_to_id(name) for key, name in names.items()}
    write_config(folder, decoder, decoder.embedding.weight.dtype, token_ids, model.owners, model.anchor_hash,
                 model.deltas)
    if model.tokenizer_config is None:
        PreTrainedTokenizerFast(tokenizer_object=model.tokenizer, **names).save_pretrained(folder)
    else:
        write_tokenizer_config(folder, model.tokenizer_config)
    model.tokenizer.save(str(folder / "tokenizer.json"))  # byte for byte the one that was trained


def write_config(folder: Path, decoder: Decoder, dtype: torch.dtype, token_ids: dict[str, int | list[int] | None],
                 owners: dict[str, int] | None = None, anchor_hash: str | None = None, deltas: Deltas | None = None
                 ) -> None:  # fmt: skip
    """The decoder needs no weights."""
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["PolyclinicForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": decoder.embedding.num_embeddings,
        **token_ids,
        **decoder.config.model_dump(mode="json", exclude_none=True),
        "slots": list(decoder.slots),
        "owners": owners or {},
        **({"deltas": deltas} if deltas else {}),
        "anchor_hash": anchor_hash,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / tokenizers.CONFIG).write_text(text, encoding="utf-8")


def load(folder: Path, device: torch.device | str = "cpu") -> ModelFolder:
    """Raises InputError naming the file or tensor that is missing or does not fit."""
    described, owners, anchor_hash = _described(folder)
    tensors = _tensors(folder, device)
    wanted = described.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        got = tensors.get(name)
        if name not in wanted or got is None or got.shape != wanted[name].shape:
            raise InputError(
                f"{folder}/{TENSORS}: tensor {name} is {None if got is None else list(got.shape)}: "
                f"want {list(wanted[name].shape) if name in wanted else 'no such tensor'}"
            )
    decoder = Decoder(described.config, described.embedding.num_embeddings, described.slots, ranks=described.ranks)
    decoder = decoder.to(device)  # buffers are computed, not stored
    decoder.load_state_dict(tensors, assign=True)
    tokenizer, config = tokenizers.load(folder / "tokenizer.json"), tokenizers.load_config(folder / "tokenizer.json")
    others = config if tokenizers.special_of(config) != tokenizers.OWN else None
    return ModelFolder(decoder, tokenizer, owners, anchor_hash, others)


def _tensors(folder: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        if not (folder / INDEX).is_file():
            return load_file(folder / TENSORS, device=str(device))
        tensors = {}
        for file in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values())):
            tensors |= load_file(folder / file, device=str(device))
        return tensors
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is not a whole model folder: {error}") from error


def outline(folder: Path) -> Decoder:
    """The decoder on the meta device, without its weights. Raises InputError where the folder describes none."""
    return _described(folder)[0]


def check(folder: Path) -> None:
    """That text can be made ready for the model of this folder, and its weights are there. Raises InputError where they
    are not, or its tokenizer is not one for it. Reads no weights."""
    weight_files(folder)
    rows = outline(folder).embedding.num_embeddings
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    check_tokenizer(folder, tokenizer, rows)
    try:
        tokenizers.ends(tokenizer, tokenizers.special_of(tokenizers.load_config(folder / "tokenizer.json")))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def check_tokenizer(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises InputError where the folder's tokenizer is none of a model with so large a vocabulary."""
    if not tokenizers.fits(tokenizer, vocab_size):
        raise InputError(f"{folder}/tokenizer.json has {tokenizer.get_vocab_size()} tokens up to number "
                         f"{tokenizers.num_ids(tokenizer) - 1}: want that of this model, whose vocabulary has "
                         f"{vocab_size}")


def _described(folder: Path) -> tuple[Decoder, dict[str, int], str | None]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a whole model folder: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != MODEL_TYPE:
        raise InputError(f"{folder} holds a model of type {kind!r}: want {MODEL_TYPE!r}")
    try:
        # Keys that have come since the folder was written are at their defaults there.
        section = ModelConfig.model_validate({key: config[key] for key, field in ModelConfig.model_fields.items()
                                              if field.is_required() or key in config})
        owners = config["owners"]
        ranks = {owners[name]: groups for name, groups in config.get("deltas", {}).items()}
        with torch.device("meta"):
            decoder = Decoder(section, config["vocab_size"], config["slots"], ranks=ranks)
        return decoder, owners, config["anchor_hash"]
    except KeyError as error:
        raise InputError(f"{folder}/config.json does not describe a model: {error.args[0]} is missing") from error
    except ValidationError as error:
        raise InputError(f"{folder}/config.json does not describe a model: {error}") from error


def is_dense(model: ModelFolder) -> bool:
    return not model.decoder.slots


def owner_of(model: ModelFolder, slot: int) -> str:
    """The name people know a slot by."""
    return "anchor" if slot == ANCHOR_SLOT else next(name for name, s in model.owners.items() if s == slot)
