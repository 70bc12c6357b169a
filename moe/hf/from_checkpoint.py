"""A model out of a training checkpoint, whose weights are whole float32 tensors however many ranks trained them."""

from typing import Any

import torch
from tokenizers import Tokenizer

from moe.config import ModelConfig
from moe.hf.folder import ModelFolder
from moe.model import Decoder
from moe.train.checkpoint import Checkpoint


def model_of(checkpoint: Checkpoint, config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype,
             tokenizer_config: dict[str, Any] | None = None) -> ModelFolder:
    """To be saved, not to be run: it has its weights, in `dtype`, routers in float32, and nothing else. The checkpoint
    is one of this model."""
    with torch.device("meta"):
        decoder = Decoder(config, checkpoint.shape("embedding.weight")[0])  # a row for each token, or some to spare
    decoder.load_state_dict({name: checkpoint.tensor(name) for name in decoder.state_dict()}, assign=True)
    return ModelFolder(decoder.cast(dtype), tokenizer, tokenizer_config=tokenizer_config)
