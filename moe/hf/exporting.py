"""A model folder of ours becomes one that transformers reads: of a plain family where that expresses the model exactly,
else of our own architecture, whose code lies beside the weights.

    source   what moe.hf.folder has
    out      config.json, generation_config.json, the weights, the tokenizer's files, README.md (the model's card), and
             export.json: of every tensor of the source its hash and where it went, of every tensor of out its hash and
             what it was made of

Whether the family can express the model, and that all tensors are there and have their shapes, is known before any is
written. In memory are one shard of the output and the tensor at hand with its parts. Written under a temporary name and
renamed: whole or absent. Weights are moved, not changed, but for the precision that is asked for; routers stay as they
are where it would change a bit of them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe import manifest
from moe.data import tokenizer as tokenizers
from moe.errors import InputError
from moe.hashing import tensor_hash
from moe.hf import architecture
from moe.hf import folder as model_folder
from moe.hf.account import EXPORTED, IMPORTED, Account
from moe.hf.card import card
from moe.hf.families import FAMILIES, Piece, pieces, split
from moe.hf.family_configs import config_of, differences
from moe.hf.importing import DTYPES
from moe.hf.source import Source
from moe.hf.writing import SHARD_BYTES, Writer
from moe.model import Decoder
from moe.whole import whole_or_absent

OWN, AUTO = model_folder.MODEL_TYPE, "auto"
PRECISIONS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
TOKENIZER_FILES = ("tokenizer.json", tokenizers.CONFIG, "special_tokens_map.json", "chat_template.jinja")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LEFT_OUT = {"load": "each expert's share of tokens, which training balances by",
            "selection_bias": "zeros, which the family does not have"}


def export_folder(source: Path, out: Path, family: str = AUTO, precision: str | None = None,
                  shard_bytes: int = SHARD_BYTES,
                  progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Write the folder `out` and return its manifest. `family` is one of FAMILIES, `polyclinic` for our own
    architecture, or `auto`; `precision` one of PRECISIONS, or None for that of the source. `progress` is told how many
    of the source's tensors are written.

    Raises InputError naming the file, key, tensor or feature that does not fit, OSError where the folder cannot be
    written."""
    _want("--as", family, (AUTO, *FAMILIES, OWN))
    if precision is not None:
        _want("--precision", precision, PRECISIONS)
    if out.exists():
        raise InputError(f"{out} exists: want a folder that is not there yet")
    ours = Source(source)
    outline = model_folder.outline(source)
    stored = _check(ours, outline)
    dtype = stored if precision is None else PRECISIONS[precision]
    tokenizer = tokenizers.load(source / "tokenizer.json")
    family, their_config = _target(ours, outline, family)
    plan = _plan(family, outline)
    imported = Account(source)

    with whole_or_absent(out) as partial:
        writer = Writer(partial, shard_bytes)
        sources: dict[str, Any] = {}
        for done, name in enumerate(outline.state_dict(), start=1):
            tensor = ours.read(name)
            sources[name] = {"dtype": ours.tensors[name].dtype, "shape": list(tensor.shape),
                             "sha256": tensor_hash(tensor)}
            imported.check(name, tensor)
            piece = plan.get(name)
            if piece is None:
                sources[name]["left_out"] = LEFT_OUT[name.rpartition(".")[2]]
            else:
                sources[name]["to"] = piece.names
                for target, part in zip(piece.names, split(piece, tensor), strict=True):
                    writer.put(target, _in_precision(part, name, dtype, family), [name])
            progress(done, len(outline.state_dict()))
        writer.finish()
        lineage = _lineage(source, outline, tokenizer, sources, ours.config["anchor_hash"])
        _describe(partial, ours, family, their_config, dtype)
        (partial / "README.md").write_text(card(
            out, source, family, outline.config, outline.embedding.num_embeddings, ours.config["owners"], outline.slots,
            ours.config.get("deltas", {}), str(dtype).removeprefix("torch."), lineage))
        written = {
            "schema": 1,
            "family": family,
            "config": ours.config,
            "tokenizer": tokenizer.get_vocab_size(),
            "lineage": lineage,
            "sources": sources,
            "targets": writer.targets,
        }
        manifest.write(partial / EXPORTED, written)
    return written


# --- before anything is written


def _want(option: str, value: str, known: Any) -> None:
    if value not in known:
        raise InputError(f"{option} is {value!r}: want one of {', '.join(known)}")


def _check(source: Source, outline: Decoder) -> torch.dtype:
    """That every tensor is there, of its shape; the embedding's dtype is returned."""
    shapes = {name: list(tensor.shape) for name, tensor in outline.state_dict().items()}
    for name in sorted(shapes.keys() | source.tensors.keys()):
        stored = source.tensors.get(name)
        if stored is None:
            raise InputError(f"{source.folder}: tensor {name} is missing: want {shapes[name]}")
        if stored.shape != shapes.get(name):
            raise InputError(f"{source.folder / stored.file}: tensor {name} is {stored.shape}: want "
                             f"{shapes.get(name, 'no such tensor')}")
        if stored.dtype not in DTYPES:
            raise InputError(f"{source.folder / stored.file}: tensor {name} is {stored.dtype}: want one of "
                             f"{', '.join(DTYPES)}")
    return DTYPES[source.tensors["embedding.weight"].dtype]


def _target(source: Source, outline: Decoder, family: str) -> tuple[str, Any]:
    """The family's name, and its config; None for our own architecture."""
    if family == OWN:
        return OWN, None
    for name in FAMILIES if family == AUTO else (family,):
        special = {key: source.config.get(key) for key in TOKEN_IDS}
        their_config = config_of(name, outline.config, outline.embedding.num_embeddings, special)
        obstacles = _obstacles(name, source, outline, their_config)
        if not obstacles:
            return name, their_config
    if family == AUTO:
        return OWN, None
    raise InputError(f"{source.folder} cannot be written as {family}, which does not express "
                     f"{', '.join(obstacles)}: want --as {OWN}, our own architecture, which does")


def _obstacles(name: str, source: Source, outline: Decoder, their_config: Any) -> list[str]:
    """Everything of this model that the family cannot express."""
    if outline.slots:
        return [f"experts that have owners (slots {', '.join(map(str, outline.slots))})"]
    found = differences(name, outline.config, their_config)
    mixture = outline.config.mixture
    if mixture and mixture.score != "sigmoid":
        found += [f"{tensor} (it has none)" for tensor in outline.state_dict()
                  if tensor.endswith(".selection_bias") and source.read(tensor).any()]
    return found


def _plan(family: str, outline: Decoder) -> dict[str, Piece]:
    """Of each tensor of ours where it goes."""
    if family == OWN:
        return {name: Piece(name, ((name,),)) for name in outline.state_dict()}
    return {piece.target: piece for piece in pieces(FAMILIES[family], outline.config)}


# --- writing


def _in_precision(tensor: Tensor, name: str, dtype: torch.dtype, family: str) -> Tensor:
    """Routers decide who computes: they keep their bits, and in our own architecture their dtype."""
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(cast.isfinite(), tensor.isfinite()):
        raise InputError(f"--precision is float16, which cannot hold {tensor.abs().max():.3g} of tensor {name}: want "
                         "bfloat16")
    if ".router." in name and (family == OWN or not torch.equal(cast.to(tensor.dtype), tensor)):
        return tensor
    return cast


def _lineage(source: Path, outline: Decoder, tokenizer: Any, sources: dict[str, Any],
             anchor_hash: str | None) -> dict[str, str]:
    special = tokenizers.special_of(tokenizers.load_config(source / "tokenizer.json"))
    lineage = {"model": manifest.value_hash({  # as ModelFolder.identity
        "tensors": {name: record["sha256"] for name, record in sources.items()},
        "model": outline.config.model_dump(mode="json"),
        "tokenizer": tokenizers.identity(tokenizer, special),
    })}
    if anchor_hash:
        lineage["anchor"] = anchor_hash
    for name in (IMPORTED, "certificate.json"):
        if (source / name).is_file():
            lineage[name] = manifest.value_hash(json.loads((source / name).read_text()))
    return lineage


def _describe(partial: Path, source: Source, family: str, their_config: Any, dtype: torch.dtype) -> None:
    if family == OWN:
        config = {**source.config, "auto_map": architecture.AUTO_MAP}
        for file in architecture.files():
            shutil.copyfile(file, partial / file.name)
    else:
        config = their_config.to_diff_dict()
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(partial / "config.json", config)
    ids = {key: source.config[key] for key in TOKEN_IDS if source.config.get(key) is not None}
    _write_json(partial / "generation_config.json", ids)
    for file in TOKENIZER_FILES:
        if (source.folder / file).is_file():
            shutil.copyfile(source.folder / file, partial / file)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
