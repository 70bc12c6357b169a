"""The decoder. Read attention, experts, router, layer, decoder in this order; each reads like its equation."""

from moe.model.decoder import Decoder, Output

__all__ = ["Decoder", "Output"]
