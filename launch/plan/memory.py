"""What a GPU must hold at the worst moment of an update, by kind, in bytes.

Weights, gradients, state and buffers follow from moe.train.engine and from what DeepSpeed 0.19.8 allocates for it, of b
elements in a bucket (zero/stage_1_and_2.py, zero/stage3.py):

    ZeRO 1   4 bytes of each of a rank's gradients, summed over micro-batches; a bucket of 4 b, two if it overlaps, and
             a copy of its content, whose sums are given back; from then on the gradient of the update
    ZeRO 2   4 bytes of a rank's share; a bucket of 2 b, two if it overlaps, and copies of its content of 2 b and 4 b
    ZeRO 3   4 bytes of a rank's share; a bucket of 4 b and a copy of its content; the share once more at the update

A micro-batch's own gradients are given back one by one, as they are added. A bucket is allocated whole, on one rank as
well; its content is copied when it is full, and by then the backward has given back a part of what it works on.
Weights are gathered in their own place. Of a layer's activations in bfloat16 a token keeps

    4 D + 3 H C + 3 G C values, and 2 F of a dense or shared network
    K (2 F values + 84 bytes) + 36 E bytes of a mixture, and with experts that are spread the K D values that came

counted by the tensors that the real layer saves (tests/launch/plan/test_memory.py counts these and the buffers again).
"""

from launch.plan.layout import Layout
from launch.plan.shape import Shape

LOGITS, LOGITS_ROWS = 2**27, 2048  # of a chunk: kernels/triton_backend/linear_cross_entropy.py
LIVE_WEIGHTS = 1e9  # that ZeRO 3 keeps gathered beside a rank's share, DeepSpeed's default
CONTEXT = 1.5e9  # CUDA's context, libraries and NCCL's buffers: a usual figure, not measured by us
FRAGMENTS = 0.05  # of all else: what the allocator cannot use


def memory(shape: Shape, layout: Layout, fullest: float = 1.0) -> dict[str, float]:
    """`fullest` is the load of the fullest rank, of which 1 is the mean."""
    n, stage, half = layout.workers, layout.zero_stage, layout.weight_bytes == 2
    rest, experts = shape.rest_parameters, shape.expert_parameters / layout.expert
    trained = shape.trained_parameters - shape.expert_parameters
    replicas = n / layout.expert  # ranks that hold the same experts
    local, local_trained = rest + experts, trained + experts
    own = trained / n + experts / replicas  # whose state this rank keeps
    sums = layout.gradient_bytes * (local_trained if stage == 1 else own)
    layer = activations(shape, layout, fullest)
    tokens = layout.tokens
    kept = 2 * shape.d_model * tokens * shape.num_layers if layout.recompute else layer * shape.num_layers
    scale = layout.weight_bytes / 2
    rows = min(tokens, max(LOGITS_ROWS, LOGITS // shape.vocab_size))
    logits = rows * shape.vocab_size * (6 if half else 4) + 4 * shape.vocab_size * shape.d_model
    logits += 2 * layout.weight_bytes * tokens * shape.d_model  # the last hidden states and their gradient
    exchange = 0.0
    if layout.expert > 1:  # rows that leave and that come back, of the chunks on their way
        exchange = 3 * 2 * scale * shape.top_k * shape.d_model * tokens * fullest
    working = {"activations": scale * kept, "work on one layer": scale * layer * (2 if layout.recompute else 1),
               "exchange": exchange, "logits": logits}
    inside = sum(working.values())
    weights = layout.weight_bytes * (local / n + min(LIVE_WEIGHTS, rest) if stage == 3 else local)
    update = 4 * own if stage != 2 else 0.0  # in ZeRO 2 the share of the sums itself
    if not (stage == 1 and layout.overlap):  # it comes when the backward is done, in the place of what that worked on
        update = max(0.0, update - inside)
    found = {
        "weights": weights,
        "gradients": sums,
        "optimizer": (4 * layout.moments + 4) * own,  # moments and master
        **working,
        "engine's buffers": _buffers(layout, local_trained, inside),
        "gradient of the update": update,
        "context": CONTEXT,
    }
    return found | {"fragments": FRAGMENTS * sum(found.values())}


def _buffers(layout: Layout, elements: float, inside: float) -> float:
    """Of gradients on their way, of a rank that has so many and whose backward works on so many bytes."""
    stage, full = layout.zero_stage, min(layout.bucket, elements)
    low, high = layout.weight_bytes, layout.gradient_bytes
    found = (low if stage == 2 else high) * layout.bucket * (2 if layout.overlap and stage < 3 else 1)
    copies = {1: 0, 2: low + high, 3: high}[stage] * full
    return found + max(0.0, copies - inside * full / elements)


def activations(shape: Shape, layout: Layout, fullest: float = 1.0) -> float:
    """Bytes that one layer keeps of a micro-batch in bfloat16: of an average layer, where some are dense."""
    D, heads, keys = shape.d_model, shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    bytes_T = 8 * D + 6 * heads + 6 * keys + 48
    dense = 4 * shape.d_ff * shape.dense_layers / shape.num_layers
    mixture = 0.0
    if shape.num_experts:
        came = 2 * D if layout.expert > 1 else 0
        rows = shape.top_k * (4 * shape.expert_d_ff + 84 + came) * fullest
        mixture = (rows + 36 * shape.num_experts + 4 * shape.shared_d_ff) * shape.mixture_layers / shape.num_layers
    return layout.tokens * (bytes_T + dense + mixture)
