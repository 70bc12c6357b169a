"""What a GPU must hold at the worst moment of an update, by kind, in bytes.

Weights, gradients and state follow from moe.train.engine. Of a layer's activations in bfloat16 a token keeps

    4 D + 3 H C + 3 G C values, and 2 F of a dense or shared network
    K (2 F values + 84 bytes) + 36 E bytes of a mixture, and with experts that are spread the K D values that came

counted by the tensors that the real layer saves (tests/launch/plan/test_memory.py counts them again).
"""

from launch.plan.layout import Layout
from launch.plan.shape import Shape

LOGITS, LOGITS_ROWS = 2**27, 2048  # of a chunk: kernels/triton_backend/linear_cross_entropy.py
BUCKET = 5e8  # elements: DeepSpeed's default for reducing and for gathering
LIVE_WEIGHTS = 1e9  # that ZeRO 3 keeps gathered, DeepSpeed's default
CONTEXT = 1.5e9  # CUDA's context, libraries and NCCL's buffers: a usual figure, not measured by us
FRAGMENTS = 0.05  # of all else: what the allocator cannot use


def memory(shape: Shape, layout: Layout, fullest: float = 1.0) -> dict[str, float]:
    """`fullest` is the load of the fullest rank, of which 1 is the mean."""
    n, half = layout.workers, layout.weight_bytes == 2
    rest, experts = shape.rest_parameters, shape.expert_parameters / layout.expert
    trained = shape.trained_parameters - shape.expert_parameters
    replicas = n / layout.expert  # ranks that hold the same experts
    local, local_trained = rest + experts, trained + experts
    own = trained / n + experts / replicas  # whose state this rank keeps
    sharded = layout.zero_stage == 3
    weights = layout.weight_bytes * (local / n if sharded else local)
    # ZeRO 1 sums in float32 beside what a micro-batch leaves; ZeRO 2 and 3 keep their share of the sums.
    sums = 4 * local_trained if layout.zero_stage == 1 and half else 4 * own
    gradients = sums + layout.weight_bytes * (min(local_trained, BUCKET) if layout.zero_stage > 1 else local_trained)
    state = (4 * layout.moments + 4 + 4) * own  # moments, master, and the gradient of the update
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
    buffers = 0.0
    if n > 1:
        buffers = (layout.gradient_bytes + layout.weight_bytes) * min(BUCKET, local_trained)
    if sharded:
        buffers += layout.weight_bytes * min(LIVE_WEIGHTS, rest)
    found = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": state,
        "activations": scale * kept,
        "work on one layer": scale * layer * (2 if layout.recompute else 1),
        "exchange": exchange,
        "logits": logits,
        "engine's buffers": buffers,
        "context": CONTEXT,
    }
    return found | {"fragments": FRAGMENTS * sum(found.values())}


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
