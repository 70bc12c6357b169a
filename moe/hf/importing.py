"""A checkpoint of another family becomes a model folder of ours, tensor by tensor.

    source   config.json, safetensors, tokenizer.json               a family of moe.hf.families
    out      what moe.hf.folder has, and import.json: of every tensor of the source its hash and where it went, of
             every tensor of ours its hash and what it was made of

That all tensors are there, none is left over and each has its shape is known from the headers, before any is read. In
memory are one shard of the output and what the tensor at hand is made of. Written under a temporary name and renamed:
whole or absent. Weights keep their dtype, routers have at least float32.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from moe import manifest
from moe.config import ModelConfig
from moe.data.tokenizer import load as load_tokenizer
from moe.errors import InputError
from moe.hashing import tensor_hash
from moe.hf import folder as model_folder
from moe.hf.families import FAMILIES, Family, Piece, joined, pieces, section_of
from moe.hf.source import INDEX, TENSORS, Source
from moe.model import Decoder

MANIFEST = "import.json"
SHARD_BYTES = 2 * 2**30
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INV_FREQ = re.compile(r".*rotary_emb\.inv_freq")
NEXT_TOKENS = "layers that predict several tokens at once, which generation without drafts does not use"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MOST_VACANT = 0.1  # share of the embedding's rows that a tokenizer may leave without a token


def import_folder(source: Path, out: Path, shard_bytes: int = SHARD_BYTES,
                  progress: Callable[[int, int], None] = lambda done, total: None,
                  origin: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write the folder `out` and return its manifest, which has `origin` besides. `progress` is told how many tensors
    of all are written.

    Raises InputError naming the file, key or tensor that is missing, left over or does not fit."""
    if out.exists():
        raise InputError(f"{out} exists: want a folder that is not there yet")
    theirs = Source(source)
    family = _family(theirs)
    their_config = _transformers_config(theirs)
    config = _section(family, their_config, theirs)
    vocab_size = their_config.vocab_size
    with torch.device("meta"):
        outline = Decoder(config, vocab_size)
    plan = pieces(family, config)
    dtype = _check(theirs, outline, plan)
    left_out = _left_out(theirs, plan, config, their_config)
    tokenizer = _tokenizer(source, vocab_size)

    with _whole_or_absent(out) as partial:
        writer = _Writer(partial, shard_bytes)
        sources: dict[str, Any] = {}
        made_of = {piece.target: piece for piece in plan}
        total = len(outline.state_dict())
        for done, (name, wanted) in enumerate(outline.state_dict().items(), start=1):
            piece = made_of.get(name)
            tensor = _made(name, wanted.shape) if piece is None else _read(theirs, piece, sources)
            writer.put(name, tensor, [] if piece is None else piece.names)
            progress(done, total)
        for name, reason in left_out.items():
            sources[name] = _record(theirs, name, theirs.read(name)) | {"left_out": reason}
        _same_head(config, sources)
        writer.finish()
        _describe(partial, outline, dtype, their_config, source)
        written = {
            "schema": 1,
            "family": theirs.config["model_type"],
            "config": theirs.config,
            "tokenizer": tokenizer.get_vocab_size(),
            "sources": sources,
            "targets": writer.targets,
            **(origin or {}),
        }
        manifest.write(partial / MANIFEST, written)
    return written


def verify(folder: Path) -> int:
    """Hold every tensor of an imported folder against its manifest; how many there are. Raises InputError naming the
    first that is not what was imported."""
    try:
        wanted = manifest.read(folder / MANIFEST)["targets"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} cannot be held against its {MANIFEST}: {error}") from error
    ours = Source(folder)
    for name in sorted(wanted.keys() | ours.tensors.keys()):
        if name not in ours.tensors or name not in wanted:
            raise InputError(f"{folder}: tensor {name} is {'missing' if name in wanted else 'not in ' + MANIFEST}")
        if tensor_hash(ours.read(name)) != wanted[name]["sha256"]:
            raise InputError(f"{folder}: tensor {name} is not what was imported: its hash differs from {MANIFEST}")
    return len(wanted)


# --- before anything is read


def _family(source: Source) -> Family:
    kind = source.config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        hint = "; this folder is one of ours already" if kind == model_folder.MODEL_TYPE else ""
        raise InputError(f"{source.folder} holds a model of type {kind!r}: want one of {known}{hint}")
    return FAMILIES[kind]


def _transformers_config(source: Source) -> Any:
    """With the defaults of the family for what the file leaves out, and old keys under their new names."""
    from transformers import CONFIG_MAPPING  # takes seconds to import: only where a model is read

    try:
        return CONFIG_MAPPING[source.config["model_type"]].from_dict(source.config)
    except Exception as error:  # what the library races through has many types
        raise InputError(f"{source.folder}/config.json does not describe a model: {error}") from error


def _section(family: Family, their_config: Any, source: Source) -> ModelConfig:
    try:
        return section_of(family, their_config)
    except ValidationError as error:
        raise InputError(f"{source.folder}/config.json describes a model that ours cannot be: "
                         f"{error.errors()[0]['msg']}") from error
    except (InputError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{source.folder}: {error}") from error


def _check(source: Source, outline: Decoder, plan: list[Piece]) -> torch.dtype:
    """That every tensor is there, of its shape and of one dtype, which is returned."""
    shapes = {name: list(tensor.shape) for name, tensor in outline.state_dict().items()}
    dtype = None
    for piece in plan:
        assert piece.target in shapes, piece
        for name in piece.names:
            stored = source.tensors.get(name)
            shape = piece.source_shape(shapes[piece.target])
            if stored is None:
                raise InputError(f"{source.folder}: tensor {name} is missing: want {shape}")
            if stored.shape != shape:
                raise InputError(f"{source.folder / stored.file}: tensor {name} is {stored.shape}: want {shape}")
            if stored.dtype not in DTYPES:
                raise InputError(f"{source.folder / stored.file}: tensor {name} is {stored.dtype}: want one of "
                                 f"{', '.join(DTYPES)}; have transformers dequantize it")
            if _of_router(piece.target):
                continue
            dtype = dtype or stored.dtype  # the embedding's, which is first
            if stored.dtype != dtype:
                raise InputError(f"{source.folder / stored.file}: tensor {name} is {stored.dtype}: want {dtype}, as "
                                 "model.embed_tokens.weight is; have transformers write it in one dtype")
    return DTYPES[dtype]


def _of_router(target: str) -> bool:
    return ".router." in target


def _left_out(source: Source, plan: list[Piece], config: ModelConfig, their_config: Any) -> dict[str, str]:
    """Tensors that make none of ours, and why. Raises InputError naming one for which there is no reason."""
    drafts = range(config.num_layers, config.num_layers + (getattr(their_config, "num_nextn_predict_layers", 0) or 0))
    used = {name for piece in plan for name in piece.names}
    reasons = {}
    for name in sorted(source.tensors.keys() - used):
        if INV_FREQ.fullmatch(name):
            reasons[name] = "frequencies, which are computed"
        elif name == "lm_head.weight":
            reasons[name] = "the embedding once more"  # held against it when both are read
        elif any(name.startswith(f"model.layers.{number}.") for number in drafts):
            reasons[name] = NEXT_TOKENS
        else:
            raise InputError(f"{source.folder / source.tensors[name].file}: tensor {name} is left over: "
                             f"{source.config['model_type']} has none of that name")
    return reasons


def _same_head(config: ModelConfig, sources: dict[str, Any]) -> None:
    head, embedding = sources.get("lm_head.weight"), sources["model.embed_tokens.weight"]
    if config.tie_embeddings and head and head["sha256"] != embedding["sha256"]:
        raise InputError("lm_head.weight differs from model.embed_tokens.weight: want them equal, or "
                         "tie_word_embeddings false in config.json")


def _tokenizer(source: Path, vocab_size: int) -> Tokenizer:
    if not (source / "tokenizer.json").is_file():
        raise InputError(f"{source} has no tokenizer.json: have AutoTokenizer load its tokenizer and save it there")
    tokenizer = load_tokenizer(source / "tokenizer.json")
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    highest = max(ids, default=-1)
    if highest >= vocab_size or len(ids) < (1 - MOST_VACANT) * vocab_size:
        raise InputError(f"{source}/tokenizer.json has {len(ids)} tokens up to number {highest}: want that of this "
                         f"model, whose vocabulary has {vocab_size}")
    return tokenizer


# --- reading and writing


def _read(source: Source, piece: Piece, sources: dict[str, Any]) -> Tensor:
    """The piece's target; what it was made of is noted."""
    tensors = []
    for name in piece.names:
        tensors.append(source.read(name))
        sources[name] = _record(source, name, tensors[-1]) | {"to": piece.target}
    tensor = joined(piece, tensors)
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if _of_router(piece.target) else tensor


def _record(source: Source, name: str, tensor: Tensor) -> dict[str, Any]:
    return {"dtype": source.tensors[name].dtype, "shape": list(tensor.shape), "sha256": tensor_hash(tensor)}


def _made(name: str, shape: torch.Size) -> Tensor:
    """What balances experts in training, which theirs do not keep: as in a router that is new."""
    kind = name.rpartition(".")[2]
    assert kind in ("selection_bias", "load"), name
    return torch.full(shape, 1 / shape[0]) if kind == "load" else torch.zeros(shape)


class _Writer:
    """Shards of about so many bytes, of whole tensors; with more than one an index of them."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.targets: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # the names in each

    def put(self, name: str, tensor: Tensor, made_of: list[str]) -> None:
        if self._tensors and sum(t.nbytes for t in self._tensors.values()) + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._tensors[name] = tensor.contiguous()
        self.targets[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape),
                              "sha256": tensor_hash(tensor), "sources": made_of}

    def _flush(self) -> None:
        save_file(self._tensors, self.folder / f"{len(self._files)}.partial", metadata={"format": "pt"})
        self._files.append(list(self._tensors))
        self._tensors = {}

    def finish(self) -> None:
        self._flush()
        count = len(self._files)
        files = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)] if count > 1 else [TENSORS]
        for number, file in enumerate(files):
            os.replace(self.folder / f"{number}.partial", self.folder / file)
        if count > 1:
            total = sum((self.folder / file).stat().st_size for file in files)
            where = {name: file for file, names in zip(files, self._files, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _describe(partial: Path, outline: Decoder, dtype: torch.dtype, their_config: Any, source: Path) -> None:
    special = {f"{kind}_token_id": getattr(their_config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    model_folder.write_config(partial, outline, dtype, special)
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, partial / file)


@contextmanager
def _whole_or_absent(out: Path) -> Iterator[Path]:
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(partial, out)
