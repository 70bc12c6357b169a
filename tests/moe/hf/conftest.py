"""Small random checkpoints of every family, written by transformers: nothing at its neutral value, so that whatever is
left out shows."""

import json
import os
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

VOCABULARY = 280
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
EXPERTS = dict(num_experts=6, num_experts_per_tok=3)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
FAMILIES = {
    "llama": dict(head_dim=12, rope_parameters=LLAMA3),
    "llama-tied": dict(tie_word_embeddings=True),
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=3, sliding_window=7),
    "qwen3": dict(head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": EXPERTS | dict(head_dim=16, moe_intermediate_size=12, mlp_only_layers=[1], norm_topk_prob=True),
    "olmo2": dict(),
    "olmoe": EXPERTS,
    "flex_olmo": EXPERTS,
    "glm4_moe": dict(
        head_dim=16, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12, first_k_dense_replace=1,
        n_group=4, topk_group=2, n_shared_experts=2, use_qk_norm=True, attention_bias=True, routed_scaling_factor=1.5,
    ),
}  # fmt: skip


class _Wide(TorchFunctionMode):
    """transformers computes norms and routers in float32 even where the model is float64: here in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wide = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if wide and function is torch.Tensor.float:
            return args[0]
        if wide and function in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if wide and function in (torch.Tensor.to, torch.Tensor.softmax, torch.softmax, F.softmax):
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return function(*args, **kwargs)


@pytest.fixture(scope="session")
def wide():
    @contextmanager
    def mode(model):
        for module in model.modules():
            if hasattr(module, "inv_freq"):  # angles are float32 in ours, too
                module.inv_freq = module.inv_freq.float()
        with _Wide(), torch.no_grad():
            yield

    return mode


@pytest.fixture
def make_theirs():
    """A function: a random model of a family."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def model(family, dtype=torch.float64, **changed):
        config = CONFIG_MAPPING[family.partition("-")[0]](**SIZES | FAMILIES[family] | changed)
        # Neither has a float32 of its own in it.
        made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", experts_implementation="eager")
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, tensor in {**dict(made.named_parameters()), **dict(made.named_buffers())}.items():
                noise = torch.randn(tensor.shape, generator=generator)
                if "norm" in name:
                    tensor.copy_(1 + 0.3 * noise)
                elif not name.endswith("inv_freq"):
                    tensor.copy_(noise * (0.3 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5))
        return made.eval().to(dtype)

    return model


@pytest.fixture
def foreign(tokenizer):
    """A function: give a checkpoint a tokenizer as SmolLM2 has it, which puts nothing before a text, and say of it in
    this file what is given."""

    def give(folder, **files):
        names = {"<|bos|>": "<|endoftext|>", "<|eos|>": "<|im_start|>", "<|pad|>": "<|im_end|>"}
        text = json.dumps(json.loads(tokenizer.to_str()) | {"post_processor": None}, ensure_ascii=False)
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        (folder / "tokenizer.json").write_text(text)
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))

    return give


@pytest.fixture
def make_checkpoint(make_theirs, tokenizer, tmp_path):
    """A function: the folder of a random model of a family, and the model."""

    def checkpoint(family, dtype=torch.float64, max_shard_size="1GB", **changed):
        theirs, folder = make_theirs(family, dtype, **changed), tmp_path / "theirs"
        theirs.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save(os.fspath(folder / "tokenizer.json"))
        return folder, theirs

    return checkpoint
