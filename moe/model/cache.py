"""Keys and values of sequences that grow: room for all of them is taken at once, so that nothing moves later.

B sequences, G key/value heads, C head size, T tokens of the step at hand.
"""

import torch
from torch import Tensor

from kernels import Documents
from moe.config import ModelConfig


class KVCache:
    """First `begin`, with the prompts; then `advance` before each further token. After each of these every layer puts
    what is new and reads what is there."""

    def __init__(self, config: ModelConfig, num_sequences: int, room: int, dtype: torch.dtype, device: torch.device):
        # By heads, because that is how decoding reads them.
        shape = config.num_layers, num_sequences, config.num_kv_heads, room, config.head_size
        self._k, self._v = torch.empty(2, *shape, dtype=dtype, device=device)
        self.room, self.longest = room, 0
        self.length_B = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        self.sequence_T = self.position_T = self.length_B.long()  # where the tokens of this step belong

    def begin(self, documents: Documents) -> None:
        """The tokens to come are the prompts: document b is the beginning of sequence b."""
        self.length_B = documents.cu_seqlens.diff()
        self.sequence_T = torch.repeat_interleave(self.length_B.long(), output_size=documents.boundaries[-1])
        self.position_T = documents.position_T
        self._make_sure(max(last - first for first, last in zip(documents.boundaries, documents.boundaries[1:],
                                                                 strict=False)))

    def advance(self) -> None:
        """The tokens to come are one of each sequence."""
        self._make_sure(self.longest + 1)
        self.sequence_T = torch.arange(len(self.length_B), device=self.length_B.device)
        self.position_T = self.length_B.long()
        self.length_B = self.length_B + 1

    def _make_sure(self, longest: int) -> None:
        if longest > self.room:
            raise ValueError(f"a sequence has {longest} tokens: want at most {self.room}, for which there is room")
        self.longest = longest

    def put(self, layer: int, k_TGC: Tensor, v_TGC: Tensor) -> None:
        for cache, new in ((self._k, k_TGC), (self._v, v_TGC)):
            cache[layer][self.sequence_T, :, self.position_T] = new

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v [B, room, G, C]."""
        return self._k[layer].transpose(1, 2), self._v[layer].transpose(1, 2)
