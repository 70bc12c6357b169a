"""Mixture layers as MegaBlocks' dMoE keeps them, and back: for who trains or serves them there.

    OUT/layer-NN.safetensors   of each mixture layer what dMoE(Arguments(**arguments)).load_state_dict takes:
            router.layer.weight [E, D]     our router's table
            experts.mlp.w1 [E * F, D]      gate rows of w_gate_up
            experts.mlp.v1 [E * F, D]      its up rows
            experts.mlp.w2 [E * F, D]      w_down, each expert's transposed
    OUT/arguments.json         its Arguments, but for activation_fn, a function there: torch.nn.functional.silu
    OUT/rest.safetensors       all other tensors under our names; config.json and the tokenizer's files
    OUT/export.json            of every tensor its hash, and what it was made of

One layer is in memory at a time, and once the rest. Weights are moved, not changed. Layers that were trained there come
back in the same files, in the model's precision or one that it holds exactly; import.json then says which tensors are
not what was exported, and one that is what another was has changed places and is refused.

A dMoE computes all of a layer in one precision, that which `fp16` or `bf16` say, or else torch's default: where that is
lower than float32, its load_state_dict rounds our router, which is kept in float32. It may then choose otherwise than
ours between experts whose scores are nearly equal, and what is saved there comes back rounded.
E experts, F hidden width, D width. Source of the names: megablocks 0.10.0, layers/{dmoe,glu,router}.py.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe import manifest
from moe.config import MixtureConfig, ModelConfig
from moe.data import tokenizer as tokenizers
from moe.errors import InputError
from moe.hashing import tensor_hash
from moe.hf import folder as model_folder
from moe.hf.account import EXPORTED, IMPORTED
from moe.hf.importing import DTYPES
from moe.hf.source import Source, header, write_tensors
from moe.hf.writing import SHARD_BYTES, Writer
from moe.whole import whole_or_absent

NAME = "dmoe"
ARGUMENTS, REST = "arguments.json", "rest.safetensors"
EMBEDDING = "embedding.weight"  # whose dtype is the model's
TABLE, GATE, UP, DOWN = "router.layer.weight", "experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"
OURS = ("router.table", "experts.w_gate_up", "experts.w_down")  # of a mixture layer, what makes the four
UNKNOWN_THERE = {  # what else a dMoE may hold, and ours may not
    "experts.bias": "a bias of the output (bias=True)",
    "experts.mlp.w1.bias": "biases within the experts",
}
# Its Arguments, beside those that `arguments` says, which change nothing of what trained layers compute: how they were
# trained, where and how fast, and what has a meaning only with a shared expert.
WITHOUT_EFFECT = frozenset({
    "num_layers", "return_bias", "mlp_impl", "fp16", "bf16", "memory_optimized_mlp", "remat_act_fn", "device",
    "init_method", "output_layer_init_method", "moe_capacity_factor", "moe_loss_weight", "moe_jitter_eps",
    "moe_lbl_in_fp32", "moe_zloss_weight", "moe_zloss_in_fp32", "moe_expert_model_parallelism", "expert_parallel_group",
    "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage", "fc_cls", "fc_kwargs",
    "shared_expert_hidden_size", "shared_expert_weighted_sum",
})  # fmt: skip
OTHERS = {"shared_expert": False, "uniform_expert_assignment": False}  # and those that do, as all of ours are
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def to_dmoe(table_ED: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor) -> dict[str, Tensor]:
    """The state of one dMoE layer."""
    D = table_ED.shape[1]
    gate_EFD, up_EFD = w_gate_up_E2FD.chunk(2, dim=1)
    return {
        TABLE: table_ED,
        GATE: gate_EFD.reshape(-1, D).contiguous(),
        UP: up_EFD.reshape(-1, D).contiguous(),
        DOWN: w_down_EDF.transpose(1, 2).reshape(-1, D).contiguous(),
    }


def from_dmoe(state: dict[str, Tensor], num_experts: int, d_ff: int, d_model: int, dtype: torch.dtype
              ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Table, w_gate_up and w_down of the state of one dMoE layer, for a model of this dtype. Raises InputError naming
    the tensor that is missing, left over, of another shape or of a dtype that this does not hold."""
    rows = [num_experts * d_ff, d_model]
    wanted = {TABLE: [num_experts, d_model], GATE: rows, UP: rows, DOWN: rows}
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state:
            why = "; experts without a gate (mlp_type='mlp') are none of ours" if name == UP else ""
            raise InputError(f"tensor {name} is missing: want {wanted[name]}{why}")
        if name not in wanted:
            raise InputError(f"tensor {name} is left over: {UNKNOWN_THERE.get(name, 'a dMoE layer of ours')} "
                             f"{'cannot be expressed' if name in UNKNOWN_THERE else 'has none of that name'}")
        if list(state[name].shape) != wanted[name]:
            raise InputError(f"tensor {name} is {list(state[name].shape)}: want {wanted[name]}")
    gate_EFD, up_EFD, down_EFD = (
        _fitting(name, state[name], dtype).view(num_experts, d_ff, d_model) for name in (GATE, UP, DOWN))
    table_ED = _fitting(TABLE, state[TABLE], dtype if state[TABLE].dtype == dtype == torch.float64 else torch.float32)
    return table_ED, torch.cat([gate_EFD, up_EFD], dim=1), down_EFD.transpose(1, 2).contiguous()


def _fitting(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype, which holds every number that its own does."""
    if tensor.dtype not in DTYPES.values() or torch.promote_types(tensor.dtype, dtype) != dtype:
        raise InputError(f"tensor {name} is {_said(tensor.dtype)}: want {_said(dtype)}, as the model has it, or a "
                         "floating precision that this holds exactly")
    return tensor.to(dtype)


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def arguments(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """MegaBlocks' Arguments of every mixture layer of a model of this dtype. Raises InputError naming what it cannot
    say."""
    mixture = config.mixture
    if obstacles := _obstacles(mixture):
        raise InputError(f"a dMoE cannot express {', '.join(obstacles)}: want --as polyclinic, our own architecture")
    sums_to_one = mixture.score == "softmax_chosen" or mixture.renormalise
    return {
        "hidden_size": config.d_model,
        "ffn_hidden_size": mixture.d_ff,
        "moe_num_experts": mixture.num_experts,
        "moe_top_k": mixture.top_k,
        "moe_normalize_expert_weights": 1 if sums_to_one else None,  # the norm by which they are divided
        "mlp_type": "glu",
        "mlp_impl": "grouped",
        "activation_fn": "silu",
        "bias": False,
        "return_bias": False,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
    }


def _obstacles(mixture: MixtureConfig | None) -> list[str]:
    if mixture is None:
        return ["a model without experts, or whose experts have owners"]
    found = [f"model.mixture.{key}={getattr(mixture, key)!r}" for key, plain in
             (("scale", 1.0), ("num_groups", 1), ("shared_d_ff", 0)) if getattr(mixture, key) != plain]
    return found + ([f"model.mixture.score={mixture.score!r}"] if mixture.score == "sigmoid" else [])


def export_dmoe(source: Path, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
                ) -> dict[str, Any]:
    """Write the folder `out` out of a model folder of ours and return its manifest. Raises InputError naming what does
    not fit, OSError where it cannot be written."""
    if out.exists():
        raise InputError(f"{out} exists: want a folder that is not there yet")
    ours, outline = Source(source), model_folder.outline(source)
    for name, wanted in outline.state_dict().items():
        if name not in ours.tensors or ours.tensors[name].shape != list(wanted.shape):
            raise InputError(f"{source}: tensor {name} is missing or of another shape: want {list(wanted.shape)}")
        if ours.tensors[name].dtype not in DTYPES:
            raise InputError(f"{source}: tensor {name} is {ours.tensors[name].dtype}: want one of {', '.join(DTYPES)}")
    said = arguments(outline.config, DTYPES[ours.tensors[EMBEDDING].dtype])
    if biased := [name for name in ours.tensors if name.endswith(".selection_bias") and ours.read(name).any()]:
        raise InputError(f"a dMoE cannot express {biased[0]}, biases of the choice: want --as polyclinic")
    layers = list(outline.mixtures())
    moved = {f"{layer}.{name}" for layer in layers for name in OURS}

    with whole_or_absent(out) as partial:
        targets: dict[str, Any] = {}
        for number, layer in enumerate(layers):
            names = [f"{layer}.{name}" for name in OURS]
            state = to_dmoe(*map(ours.read, names))
            file = _file(layer)
            write_tensors(state, partial / file)
            made_of = {TABLE: names[:1], GATE: names[1:2], UP: names[1:2], DOWN: names[2:]}
            targets |= {f"{file}:{name}": _record(tensor, made_of[name]) for name, tensor in state.items()}
            progress(number, len(layers))
        rest = {name: ours.read(name) for name in outline.state_dict() if name not in moved}
        write_tensors(rest, partial / REST)
        targets |= {f"{REST}:{name}": _record(tensor, [name]) for name, tensor in rest.items()}
        (partial / ARGUMENTS).write_text(json.dumps(said, indent=2) + "\n")
        for file in ("config.json", *TOKENIZER_FILES):
            if (source / file).is_file():
                shutil.copyfile(source / file, partial / file)
        sources = {name: {"sha256": tensor_hash(ours.read(name))} for name in outline.state_dict()}
        written = {"schema": 1, "family": NAME, "sources": sources, "targets": targets}
        manifest.write(partial / EXPORTED, written)
    return written


def is_dmoe(folder: Path) -> bool:
    """Whether it is one that `export_dmoe` has written."""
    return (folder / ARGUMENTS).is_file() and (folder / REST).is_file()


def import_dmoe(source: Path, out: Path, shard_bytes: int = SHARD_BYTES,
                progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Write a model folder of ours out of what `export_dmoe` has written, with layers as they are now, and return its
    manifest. Raises InputError naming the file and tensor that does not fit."""
    if out.exists():
        raise InputError(f"{out} exists: want a folder that is not there yet")
    outline = model_folder.outline(source)
    mixture, files = outline.config.mixture, {_file(layer): layer for layer in outline.mixtures()}
    _check_arguments(source, outline.config)
    for file in sorted({path.name for path in source.glob("*.safetensors")} - files.keys() - {REST}):
        raise InputError(f"{source / file} is left over: want {REST} and the files of the {len(files)} mixture layers "
                         "that config.json has")
    tokenizer = tokenizers.load(source / "tokenizer.json")
    model_folder.check_tokenizer(source, tokenizer, outline.embedding.num_embeddings)
    try:
        exported = {place: tensor["sha256"] for place, tensor in manifest.read(source / EXPORTED)["targets"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source / EXPORTED} cannot be read: {error}") from error
    moved = {f"{layer}.{own}" for layer in files.values() for own in OURS}
    wanted = {name: list(tensor.shape) for name, tensor in outline.state_dict().items() if name not in moved}

    with whole_or_absent(out) as partial:
        writer = Writer(partial, shard_bytes)
        rest = _read(source / REST)
        with _within(source / REST):
            _check_rest(rest, wanted)
            sources, dtype = _sources(REST, rest, exported), rest[EMBEDDING].dtype
            for name in wanted:
                tensor = _fitting(name, rest[name], torch.float32 if ".router." in name else dtype)
                writer.put(name, tensor, [f"{REST}:{name}"])
        for number, (file, layer) in enumerate(files.items()):
            state = _read(source / file)
            with _within(source / file):
                made = from_dmoe(state, mixture.num_experts, mixture.d_ff, outline.config.d_model, dtype)
                sources |= _sources(file, state, exported)
            for own, tensor, parts in zip(OURS, made, ((TABLE,), (GATE, UP), (DOWN,)), strict=True):
                writer.put(f"{layer}.{own}", tensor, [f"{file}:{part}" for part in parts])
            progress(number, len(files))
        writer.finish()
        for file in ("config.json", *TOKENIZER_FILES):
            if (source / file).is_file():
                shutil.copyfile(source / file, partial / file)
        written = {"schema": 1, "family": NAME, "sources": sources, "targets": writer.targets}
        manifest.write(partial / IMPORTED, written)
    return written


def _check_arguments(source: Path, config: ModelConfig) -> None:
    """The layers were computed there as ours compute them."""
    path = source / ARGUMENTS
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no object: want the Arguments of a dMoE")
    wanted = arguments(config, torch.float32)  # in which precision they were computed, each tensor says itself
    for key, ours in wanted.items():
        if key not in WITHOUT_EFFECT and found.get(key) != ours:
            raise InputError(f"{path}: {key}={found.get(key)!r}: want {ours!r}, as config.json has it")
    for key in sorted(found.keys() - wanted.keys() - WITHOUT_EFFECT):
        if key not in OTHERS or found[key] != OTHERS[key]:
            raise InputError(f"{path}: {key}={found[key]!r}: want {OTHERS.get(key, 'it left out')}, because our layers "
                             "have nothing of the kind")


def _file(layer: str) -> str:
    """layers.3.ffn -> layer-03.safetensors"""
    return f"layer-{int(layer.split('.')[1]):02}.safetensors"


@contextmanager
def _within(path: Path) -> Iterator[None]:
    """What is wrong with a tensor is said with its file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    header(path)  # names the tensor that a file ends within
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _check_rest(rest: dict[str, Tensor], wanted: dict[str, list[int]]) -> None:
    """That all tensors but those of the mixture layers are there, and each has its shape."""
    for name in sorted(wanted.keys() ^ rest.keys()):
        raise InputError(f"tensor {name} is {'missing' if name in wanted else 'left over'}")
    for name, shape in wanted.items():
        if list(rest[name].shape) != shape:
            raise InputError(f"tensor {name} is {list(rest[name].shape)}: want {shape}")


def _sources(file: str, tensors: dict[str, Tensor], exported: dict[str, str]) -> dict[str, Any]:
    """Of each tensor what it is, and whether it is what was exported. Raises InputError naming one that is what was
    exported in another place."""
    places = {sha256: place for place, sha256 in exported.items()}
    found = {}
    for name, tensor in tensors.items():
        own = _record(tensor, [])
        as_exported = own["sha256"] == exported.get(f"{file}:{name}")
        if not as_exported and own["sha256"] in places:
            raise InputError(f"tensor {name} is what {places[own['sha256']]} was: want each in its place")
        found[f"{file}:{name}"] = own | {"as_exported": as_exported}
    return found


def _record(tensor: Tensor, sources: list[str]) -> dict[str, Any]:
    return {"dtype": _said(tensor.dtype), "shape": list(tensor.shape),
            "sha256": tensor_hash(tensor), "sources": sources}
