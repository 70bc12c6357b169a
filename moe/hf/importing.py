"""A checkpoint of another family becomes a model folder of ours, tensor by tensor.

    source   config.json, safetensors, tokenizer.json               a family of moe.hf.families
    out      what moe.hf.folder has, and import.json: of every tensor of the source its hash and where it went, of
             every tensor of ours its hash and what it was made of

That all tensors are there, none is left over and each has its shape is known from the headers, before any is read. In
memory are one shard of the output and what the tensor at hand is made of. Written under a temporary name and renamed:
whole or absent. Weights keep their dtype, routers have at least float32.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from torch import Tensor

from moe import manifest
from moe.config import ModelConfig
from moe.data import tokenizer as tokenizers
from moe.errors import InputError
from moe.hashing import tensor_hash
from moe.hf import folder as model_folder
from moe.hf.account import IMPORTED, Account
from moe.hf.families import FAMILIES, Family, Piece, joined, pieces, section_of
from moe.hf.source import Source
from moe.hf.writing import SHARD_BYTES, Writer
from moe.model import Decoder
from moe.whole import whole_or_absent

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INV_FREQ = re.compile(r".*rotary_emb\.inv_freq")
NEXT_TOKENS = "layers that predict several tokens at once, which generation without drafts does not use"
TEMPLATE, NAMES = "chat_template.jinja", "special_tokens_map.json"
TOKENIZER_FILES = ("tokenizer.json", NAMES, TEMPLATE)  # that are copied as they are


def import_folder(source: Path, out: Path, shard_bytes: int = SHARD_BYTES,
                  progress: Callable[[int, int], None] = lambda done, total: None,
                  origin: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write the folder `out` and return its manifest, which has `origin` besides. `progress` is told how many tensors
    of all are written.

    Raises InputError naming the file, key or tensor that is missing, left over or does not fit, OSError where the
    folder cannot be written."""
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
    tokenizer_config = _tokenizer_config(source, tokenizer, their_config)
    _check_head(theirs, config)
    exported = Account(source)

    with whole_or_absent(out) as partial:
        writer = Writer(partial, shard_bytes)
        sources: dict[str, Any] = {}
        made_of = {piece.target: piece for piece in plan}
        total = len(outline.state_dict())
        for done, (name, wanted) in enumerate(outline.state_dict().items(), start=1):
            piece = made_of.get(name)
            tensor = _made(name, wanted.shape) if piece is None else _read(theirs, piece, sources, exported)
            writer.put(name, tensor, [] if piece is None else piece.names)
            progress(done, total)
        for name, reason in left_out.items():
            sources[name] = _record(theirs, name, theirs.read(name)) | {"left_out": reason}
        writer.finish()
        _describe(partial, outline, dtype, their_config, source)
        model_folder.write_tokenizer_config(partial, tokenizer_config)
        written = {
            "schema": 1,
            "family": theirs.config["model_type"],
            "config": theirs.config,
            "tokenizer": tokenizer.get_vocab_size(),
            "sources": sources,
            "targets": writer.targets,
            **(origin or {}),
        }
        manifest.write(partial / IMPORTED, written)
    return written


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
        config = CONFIG_MAPPING[source.config["model_type"]].from_dict(source.config)
        # A context length before the stretch that lies beside rope_parameters goes before that among them, and only
        # this puts it there: the models call it, too, when they are made.
        config.standardize_rope_params()
        return config
    except Exception as error:  # what the library races through has many types
        raise InputError(f"{source.folder}/config.json does not describe a model: {error}") from error


def _section(family: Family, their_config: Any, source: Source) -> ModelConfig:
    try:
        return section_of(family, their_config)
    except ValidationError as error:
        raise InputError(f"{source.folder}/config.json describes a model that ours cannot be: "
                         f"{error.errors()[0]['msg']}") from error
    except InputError as error:
        raise InputError(f"{source.folder}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{source.folder}/config.json describes a model that ours cannot be: {error!r}") from error


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
            reasons[name] = "the embedding once more"  # see _check_head
        elif any(name.startswith(f"model.layers.{number}.") for number in drafts):
            reasons[name] = NEXT_TOKENS
        else:
            raise InputError(f"{source.folder / source.tensors[name].file}: tensor {name} is left over: "
                             f"{source.config['model_type']} has none of that name")
    return reasons


def _check_head(source: Source, config: ModelConfig) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_embeddings and head in source.tensors and tensor_hash(source.read(head)) != tensor_hash(
            source.read(embedding)):
        raise InputError(f"{source.folder}: tensor {head} differs from {embedding}: want them equal, or "
                         "tie_word_embeddings false in config.json")


def _tokenizer(source: Path, vocab_size: int) -> Tokenizer:
    if not (source / "tokenizer.json").is_file():
        raise InputError(f"{source} has no tokenizer.json: have AutoTokenizer load its tokenizer and save it there")
    tokenizer = tokenizers.load(source / "tokenizer.json")
    model_folder.check_tokenizer(source, tokenizer, vocab_size)
    return tokenizer


def _tokenizer_config(source: Path, tokenizer: Tokenizer, their_config: Any) -> dict[str, Any]:
    """Theirs, and in it what it leaves to other files: which tokens stand around a document, and the template of a
    conversation. It goes wherever the tokenizer goes."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | (tokenizers.load_config(source / "tokenizer.json") or {})
    names = tokenizers.load_config(source / "tokenizer.json", NAMES) or {}
    tokens = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for kind in tokenizers.Special._fields:
        number = getattr(their_config, f"{kind}_token_id", None)
        of_model = tokens.get(number[0] if isinstance(number, list) else number)
        name = tokenizers.name_of(kind, config) or tokenizers.name_of(kind, names) or of_model
        config[f"{kind}_token"] = name
    if (source / TEMPLATE).is_file():
        try:
            config["chat_template"] = (source / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{source / TEMPLATE} is not in UTF-8: want a template that is") from error
    return config


# --- reading and writing


def _read(source: Source, piece: Piece, sources: dict[str, Any], exported: Account) -> Tensor:
    """The piece's target; what it was made of is noted."""
    tensors = []
    for name in piece.names:
        tensors.append(source.read(name))
        exported.check(name, tensors[-1])
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


def _describe(partial: Path, outline: Decoder, dtype: torch.dtype, their_config: Any, source: Path) -> None:
    special = {f"{kind}_token_id": getattr(their_config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    model_folder.write_config(partial, outline, dtype, special)
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, partial / file)
