"""A GGUF file becomes a model folder of ours: transformers reads it, and its quantized weights become float32.

Here the whole model is in memory once, and on the disk twice, because it is transformers that reads the file. Wants the
packages gguf and accelerate.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from moe.errors import InputError
from moe.hf.importing import import_folder
from moe.hf.source import TENSORS, write_tensors
from moe.hf.writing import SHARD_BYTES
from moe.manifest import file_hash

PACKAGES = ("gguf", "accelerate")


def import_gguf(file: Path, out: Path, shard_bytes: int = SHARD_BYTES,
                progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """As `import_folder`; its manifest has the hash of the file besides. The tokenizer is the file's own."""
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{file} is no GGUF file: want one that begins with GGUF")
    origin = {"gguf": {"file": file.name, "sha256": file_hash(file)}}
    if absent := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"{file} cannot be read without {' and '.join(absent)}: pip install {' '.join(absent)}")
    if out.exists():
        raise InputError(f"{out} exists: want a folder that is not there yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        _dequantize(file, Path(folder))
        return import_folder(Path(folder), out, shard_bytes, progress, origin)


def _dequantize(file: Path, folder: Path) -> None:
    """What `save_pretrained` would write, which refuses a model that was quantized."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except Exception as error:  # what the library races through has many types
        raise InputError(f"{file} cannot be read: {error}") from error
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
