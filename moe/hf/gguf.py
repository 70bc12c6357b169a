"""A GGUF file becomes a model folder of ours: transformers reads it, and its quantized weights become float32.

Here the whole model is in memory once, and on the disk twice, because it is transformers that reads the file. Wants the
packages gguf and accelerate.

transformers takes those of the file's tensors and keys that it has a place for, passes over the others, and makes up
what is missing. So all of them are held against what it has places for, before it reads a tensor, and what it read
against the model. What no file tells: one without output.weight has the embedding for a head, meant or not.
"""

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from moe.errors import InputError
from moe.hf.importing import import_folder
from moe.hf.source import TENSORS, write_tensors
from moe.hf.writing import SHARD_BYTES
from moe.manifest import file_hash

PACKAGES = ("gguf", "accelerate")
ARCHITECTURES = ("llama", "qwen3")  # of whose tensors each has one place in transformers: stacked experts have not
# For which transformers has a number of its own.
NEEDED = ("context_length", "attention.layer_norm_rms_epsilon", "attention.head_count")
# What transformers passes over of tokenizer.ggml.pre, which says how text is cut before it is merged (llama.cpp's).
GPT2, GPT2_BEHIND_DIGITS = ("gpt-2", "mpt", "olmo", "jais"), ("smollm", "starcoder", "refact", "command-r", "codeshell")
LISTS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
INSTEAD = "the model as a folder in Hugging Face layout"
HEAD, FREQUENCIES = "output.weight", "rope_freqs.weight"


def import_gguf(file: Path, out: Path, shard_bytes: int = SHARD_BYTES,
                progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """As `import_folder`; its manifest has the hash of the file besides. The tokenizer is the file's own."""
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{file} is no GGUF file: want one that begins with GGUF")
    if absent := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"{file} cannot be read without {' and '.join(absent)}: pip install {' '.join(absent)}")
    if out.exists():
        raise InputError(f"{out} exists: want a folder that is not there yet")
    before_merging = _check(file)
    origin = {"gguf": {"file": file.name, "sha256": file_hash(file)}}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        _dequantize(file, Path(folder), before_merging)
        try:
            return import_folder(Path(folder), out, shard_bytes, progress, origin)
        except InputError as error:  # the folder is gone when somebody reads this
            raise InputError(str(error).replace(folder, str(file))) from error


# --- before anything is read


def _check(file: Path) -> str | None:
    """That transformers takes every key and every tensor of the file, and has all that it needs; the name of the way in
    which text is cut before it is merged. Raises InputError naming one with which that is not so."""
    header, said = _header(file)
    of_tokenizer = {key: said.pop(key) for key in [*said] if key.startswith("tokenizer.")}
    if (count := said.get("split.count", 1)) > 1:
        first = re.sub(r"-\d+-of-(\d+)\.gguf$", r"-00001-of-\1.gguf", file.name)
        raise InputError(f"{file} is part {said.get('split.no', 0) + 1} of {count}: want all of them in one file, such "
                         f"as gguf-split --merge {first} writes")
    if (architecture := said.get("general.architecture")) not in ARCHITECTURES:
        raise InputError(f"{file} holds a model of architecture {architecture!r}: want {' or '.join(ARCHITECTURES)}, "
                         f"or {INSTEAD}")
    config, names = _places(file, architecture)
    _check_keys(file, architecture, said, config)
    _check_tokenizer(file, of_tokenizer)
    found = {tensor.name for tensor in header.tensors}
    for name in sorted(names - found - {HEAD}):
        raise InputError(f"{file}: tensor {name} is missing")
    for name in sorted(found - names):
        why = " (it stretches the context, as in Llama 3.1)" if name == FREQUENCIES else ""
        raise InputError(f"{file}: tensor {name} is left over{why}, because transformers has no place for it in a "
                         f"{architecture} model: want {INSTEAD}")
    return of_tokenizer.get("tokenizer.ggml.pre")


def _header(file: Path) -> tuple[Any, dict[str, Any]]:
    """The library's reader, by which no tensor has been read yet, and what the keys say that are no long lists."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    class Reader(GGUFReader):
        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            """The library's says of a file that is too short that an array cannot be reshaped."""
            for field in fields:
                *_, dims, kind, offset = field.parts
                elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
                end = int(start_offs + offset[0]) + math.prod(dims.tolist()) * size // elements
                if end > len(self.data):
                    raise InputError(f"{file}: tensor {field.name} is not whole: the file ends at byte "
                                     f"{len(self.data)}, the tensor at {end}")
            super()._build_tensors(start_offs, fields)

    try:
        reader = Reader(file)
        return reader, {key: field.contents() for key, field in reader.fields.items() if key not in LISTS}
    except InputError:
        raise
    except Exception as error:  # what the library stumbles over has many types
        raise InputError(f"{file} cannot be read: {error}") from error


def _places(file: Path, architecture: str) -> tuple[Any, set[str]]:
    """transformers' config of the file, and the names that tensors have in it for which its model has a place."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config)
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)()
        return config, set(get_gguf_hf_weights_map(outline, processor))
    except Exception as error:  # what the library races through has many types
        raise InputError(f"{file} cannot be read: {error}") from error


def _check_keys(file: Path, architecture: str, said: dict[str, Any], config: Any) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_MAPPING

    taken = {key for key, theirs in GGUF_CONFIG_MAPPING[config.model_type].items() if theirs is not None}
    as_there = {  # what transformers has for the commonest of those that it does not take
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim, "rope.scaling.type": "none", "attention.causal": True,
        "expert_count": 0, "expert_used_count": 0,
    }  # fmt: skip
    for key in NEEDED:
        if f"{architecture}.{key}" not in said:
            raise InputError(f"{file}: key {architecture}.{key} is missing")
    for name, value in said.items():
        key = name.removeprefix(f"{architecture}.")
        if key == name or key in taken or value == as_there.get(key):
            continue
        wanted = repr(as_there[key]) if key in as_there else "no such key"
        raise InputError(f"{file} has {name}={value!r}, which transformers does not take from a GGUF file: want "
                         f"{wanted}, or {INSTEAD}")


def _check_tokenizer(file: Path, said: dict[str, Any]) -> None:
    """That what comes out cuts text as the model has learned it."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = sorted({*GGUF_PRE_TOKENIZER_SPLITS, *GPT2, *GPT2_BEHIND_DIGITS})
    wanted: dict[str, tuple[Any, ...]] = {"model": ("gpt2", "llama")}
    if said.get("tokenizer.ggml.model") == "gpt2":
        wanted["pre"] = tuple(known)
    else:
        wanted["add_space_prefix"] = (None, True)
    for key, values in wanted.items():
        if (value := said.get(f"tokenizer.ggml.{key}")) not in values:
            raise InputError(f"{file} has tokenizer.ggml.{key}={value!r}, by which transformers would cut text in "
                             f"another way: want {' or '.join(map(str, values))}, or {INSTEAD}")


# --- reading


def _dequantize(file: Path, folder: Path, before_merging: str | None) -> None:
    """What `save_pretrained` would write, which refuses a model that was quantized."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, output_loading_info=True, ignore_mismatched_sizes=True)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        if before_merging in GPT2_BEHIND_DIGITS:
            parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # what the library races through has many types
        raise InputError(f"{file} cannot be read: {error}") from error
    for name, got, wanted in sorted(report["mismatched_keys"]):
        raise InputError(f"{file}: tensor {name}, as transformers calls it, is {list(got)}: want {list(wanted)}")
    for problem in ("missing_keys", "unexpected_keys"):
        for name in sorted(report[problem]):
            raise InputError(f"{file}: tensor {name}, as transformers calls it, is {problem.partition('_')[0]}")
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(_as_written(config)))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_tensors(tensors, folder / TENSORS)


def _as_written(value: Any) -> Any:
    """The decimal that was meant by a number which the file keeps in float32: 1e-05 for 9.999999747378752e-06."""
    if isinstance(value, dict):
        return {key: _as_written(inner) for key, inner in value.items()}
    return float(str(np.float32(value))) if isinstance(value, float) else value
