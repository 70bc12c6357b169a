"""What a job's model makes of held-out text: bits per byte of each domain and of all, and where its tokens go.

Measured by all ranks on the model they have trained, so that nobody needs to hold all of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moe.data.shards import PackedDocuments
from moe.eval.bits import Forward, count_bits
from moe.model import Decoder, Output
from moe.train import routing


def measure(model: Decoder, forward: Forward, held_out: Mapping[str, PackedDocuments], max_tokens: int | None,
            observe: Callable[[Output], None] = lambda output: None) -> dict[str, Any]:
    """Plain values. `forward` is called in the model's place. Every rank must call it."""
    domains, counts, bits, num_bytes = {}, {}, 0.0, 0
    for name, packed in held_out.items():
        tally = routing.Tally(model) if model.routers() else None

        def see(output: Output, tally: routing.Tally | None = tally) -> None:
            observe(output)
            if tally:
                tally.add(output.routes)

        found = count_bits(model, packed, max_tokens, see, forward)
        domains[name] = {"bpb": found.per_byte, "bytes": found.num_bytes}
        bits, num_bytes = bits + found.total, num_bytes + found.num_bytes
        if tally:
            counts[name] = tally.count()
    figures: dict[str, Any] = {"bpb": bits / num_bytes, "domains": domains}
    if counts:
        top_k = model.routers()[0].gate.top_k
        figures["routing"] = {
            **routing.row(sum(counts.values()), top_k),
            "share": {name: routing.rounded(routing.load(count_LS)) for name, count_LS in counts.items()},
        }
    return figures
