"""Where the time of an update goes, in seconds, by kind.

A product of r rows takes   flops / rate + bytes / bandwidth   : what fills and drains the device is paid on top, which
is why products with little depth, such as those of small experts, are slower than large ones (65536 x 1024 x 1024 on an
H100: 523 TFLOP/s by this rule with the best product's rate, 583 measured, facebookexperimental/triton PR #1038).
Everything between products moves bytes. Collectives move bytes over the slowest link they cross and wait for messages.

    update = accumulation x (forward + backward + what is computed again + exchange not hidden)
             + gradients and weights not hidden + optimizer
"""

import math
from dataclasses import dataclass

from launch.plan.cluster import Cluster, Link
from launch.plan.layout import Layout
from launch.plan.rates import LINK, Device
from launch.plan.shape import Shape

HOST_WAIT = 30e-6  # the host reads how many rows travel, once a layer: a usual figure of a copy and a wait
# The host hands out so many launches a layer and micro-batch, at so many seconds each: usual figures of eager PyTorch.
# Where the device is done sooner, as in small models, that is the time.
LAUNCH, LAUNCHES = 6e-6, 100
STATE_BYTES = 40  # read and written by AdamW of a parameter, with clipping and the cast to bfloat16
HIDEABLE = 2 / 3  # of forward and backward, the backward: gradients travel under it


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in an update, by kind, and how long that takes if nothing hides it."""

    exchange: float
    gradients: float
    weights: float
    exchange_s: float
    gradients_s: float
    weights_s: float


@dataclass(frozen=True)
class Step:
    parts: dict[str, float]  # kind -> seconds of an update
    traffic: Traffic
    tokens: int  # of an update
    flops: float  # of an update, of one GPU, as the model needs them

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def mfu(self, device: Device) -> float:
        return self.flops / self.seconds / device.peak


def step(shape: Shape, layout: Layout, cluster: Cluster, fullest: float = 1.0, slowest: float = 1.0,
         device: Device | None = None) -> Step:
    """`fullest`: load of the fullest rank's experts; `slowest`: how much longer the slowest rank computes; `device`:
    other rates than the published ones of the cluster's."""
    device, times = device or cluster.kind, layout.accumulation
    forward, backward = (_compute(shape, layout, device, fullest, again) for again in (False, True))
    head = _head(shape, layout, device)
    again = {kind: layout.recompute * seconds for kind, seconds in forward.items()}
    parts = {kind: slowest * times * (forward[kind] + backward[kind] + head.get(kind, 0.0)) for kind in forward}
    recomputed = slowest * times * sum(again.values())
    mixture = slowest * times * (forward["experts"] + backward["experts"] + again["experts"])
    computing = sum(parts.values()) + recomputed
    exchange, exchange_s, waits = _exchange(shape, layout, cluster, fullest)
    # The larger of the two, and of the smaller what no other chunk covers.
    hidden = min(mixture, exchange_s) * (1 - 1 / layout.chunks)
    launching = LAUNCH * LAUNCHES * shape.num_layers * times * (1 + layout.recompute / 3)
    gradients, gradients_s = _gradients(shape, layout, cluster)
    weights, weights_s = _weights(shape, layout, cluster)
    optimizer = _optimizer(shape, layout, device)
    exposed, gathering = gradients_s, weights_s
    if layout.overlap:
        under = HIDEABLE * computing / (1 if layout.zero_stage > 1 else times)  # stage 1: under the last backward only
        if layout.zero_stage == 3:  # gathered and reduced under all of it
            left = max(0.0, 1 - computing / max(gradients_s + weights_s, 1e-12))
            exposed, gathering = left * gradients_s, left * weights_s
        else:
            exposed = max(0.0, gradients_s - under)
    parts |= {"computed again": recomputed, "waiting for the host": max(0.0, launching - computing),
              "exchange": exchange_s - hidden + waits, "gradients": exposed, "weights": gathering,
              "optimizer": optimizer}
    flops = layout.tokens * times * shape.training_flops(layout.context)
    return Step(parts, Traffic(exchange, gradients, weights, exchange_s, gradients_s, weights_s), layout.batch_tokens,
                flops)


def _product(rows: float, width: float, out: float, device: Device, count: int = 1, share: float = 1.0) -> float:
    """`count` products, each of rows [rows, width] with a matrix [width, out], in bfloat16."""
    moved = 2 * (rows * width + width * out + rows * out)
    return count * (2 * rows * width * out / (share * device.product_rate) + moved / device.bandwidth)


def _compute(shape: Shape, layout: Layout, device: Device, fullest: float, backward: bool) -> dict[str, float]:
    """Of a micro-batch in all layers. Backward has two products for each, one where the weight is frozen."""
    T, D, F = layout.tokens, shape.d_model, shape.d_ff
    heads, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    frozen = shape.frozen_parameters > 0  # a pack: all products but half of the network's have no weight gradient
    passes = (1 if frozen else 2) if backward else 1
    ffn_passes = (1.5 if frozen else 2) if backward else 1
    products = passes * (2 * _product(T, D, heads, device) + 2 * _product(T, D, keys, device)) * shape.num_layers
    products += ffn_passes * shape.dense_layers * _ffn(T, D, F, shape.matrices, device)
    experts = 0.0
    if shape.num_experts:
        local = shape.num_experts // layout.expert
        count = local * layout.chunks  # each chunk reads the weights again
        rows = T * shape.top_k * fullest / count
        one = _product(rows, D, (shape.matrices - 1) * shape.expert_d_ff, device, count, device.grouped)
        one += _product(rows, shape.expert_d_ff, D, device, count, device.grouped)
        experts = ffn_passes * shape.mixture_layers * one
        products += ffn_passes * shape.mixture_layers * _ffn(T, D, shape.shared_d_ff, shape.matrices, device)
    attention = T * shape.attention_flops(layout.context) * (2.5 if backward else 1) / device.attention_rate(backward)
    return {"products": products, "experts": experts, "attention": attention,
            "between products": T * _bytes_between(shape, layout, backward) / device.bandwidth}


def _ffn(T: float, D: int, F: int, matrices: int, device: Device) -> float:
    return _product(T, D, (matrices - 1) * F, device) + _product(T, F, D, device) if F else 0.0


def _bytes_between(shape: Shape, layout: Layout, backward: bool) -> float:
    """Read and written of a token in all layers by what is no product: norms and residuals, rotation, activation, and
    in a mixture the rows that are gathered and added up."""
    D, turned = shape.d_model, shape.num_heads * shape.head_size + shape.num_kv_heads * shape.head_size
    streams, active = (20, 12) if backward else (18, 2)
    found = shape.num_layers * (streams * D + 4 * turned)
    found += active * shape.d_ff * shape.dense_layers
    rows = shape.top_k * (active * shape.expert_d_ff + (8 if layout.expert > 1 else 4) * D)
    return found + shape.mixture_layers * (rows + active * shape.shared_d_ff + 12 * shape.num_experts)


def _head(shape: Shape, layout: Layout, device: Device) -> dict[str, float]:
    """The loss: three products, all in the forward, and 18 bytes of each logit."""
    product = _product(layout.tokens, shape.d_model, shape.vocab_size, device)
    moved = 18 * layout.tokens * shape.vocab_size / device.bandwidth
    return {"products": (2 if shape.frozen_parameters else 3) * product, "between products": moved}


def _optimizer(shape: Shape, layout: Layout, device: Device) -> float:
    experts, rest = shape.expert_parameters / layout.expert, shape.trained_parameters - shape.expert_parameters
    own = rest / layout.workers + experts * layout.expert / layout.workers
    added = 10 * (rest + experts) * layout.accumulation if layout.zero_stage == 1 else 0  # bfloat16 to float32 sums
    return (STATE_BYTES * own + added) / device.bandwidth


def _exchange(shape: Shape, layout: Layout, cluster: Cluster, fullest: float) -> tuple[float, float, float]:
    """Bytes, their seconds, and the seconds of messages and waits, of an update."""
    R = layout.expert
    if R == 1 or not shape.num_experts:
        return 0.0, 0.0, 0.0
    trips = shape.mixture_layers * layout.accumulation * (4 + 2 * layout.recompute)  # there and back, and again
    rows = layout.tokens * shape.top_k * fullest
    sent = rows * (layout.weight_bytes * shape.d_model + 2)  # and a float32 weight one way
    nodes, inside = cluster.spread(R)
    near, far = sent * (inside - 1) / R, sent * (R - inside) / R
    seconds = max(near / _speed(cluster.node_link), far / _speed(cluster.network))
    link = cluster.network if nodes > 1 else cluster.node_link
    messages = 1e-6 * link.latency_us * max(1.0, math.log2(R)) * layout.chunks
    waits = shape.mixture_layers * layout.accumulation * (1 + layout.recompute) * (HOST_WAIT + messages)
    return trips * (near + far), trips * seconds, trips * messages + waits


def _gradients(shape: Shape, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    times = 1 if layout.zero_stage == 1 else layout.accumulation
    return _over_replicas(shape, layout, cluster, layout.gradient_bytes, times * (2 if layout.all_reduce else 1))


def _weights(shape: Shape, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """After an update, those that others hold the state of; in ZeRO 3 all, for the forward and for the backward."""
    times = 2 * layout.accumulation if layout.zero_stage == 3 else 1
    return _over_replicas(shape, layout, cluster, layout.weight_bytes, times)


def _over_replicas(shape: Shape, layout: Layout, cluster: Cluster, size: int, times: int) -> tuple[float, float]:
    """Of every trained parameter so many bytes, over the ranks that hold the same: (bytes sent, seconds)."""
    n, R = layout.workers, layout.expert
    rest = shape.trained_parameters - shape.expert_parameters
    if layout.zero_stage == 3 and size == layout.weight_bytes:
        rest = shape.rest_parameters
    nodes, inside = cluster.spread(n)
    sent, seconds = _ring(size * rest, nodes, inside, cluster)
    if shape.num_experts:
        experts = size * shape.expert_parameters / R
        # Ranks of equal place in their groups: where a group fills a node, one on each.
        more, longer = _ring(experts, *((nodes, max(1, inside // R)) if R <= inside else (n // R, 1)), cluster)
        sent, seconds = sent + more, seconds + longer
    return times * sent, times * seconds


def _ring(size: float, nodes: int, inside: int, cluster: Cluster) -> tuple[float, float]:
    """A reduce-scatter or all-gather of so many bytes over nodes with so many ranks each, all of whose links to other
    nodes are used: bytes that a rank sends, and seconds."""
    n = nodes * inside
    if n == 1:
        return 0.0, 0.0
    near = size * (n - 1) / n / _speed(cluster.node_link) if inside > 1 else 0.0
    far = size * (nodes - 1) / nodes / inside / _speed(cluster.network) if nodes > 1 else 0.0
    link = cluster.network if nodes > 1 else cluster.node_link
    return size * (n - 1) / n, max(near, far) + 1e-6 * link.latency_us * math.log2(n)


def _speed(link: Link | None) -> float:
    """Bytes a second that collectives reach."""
    return 1e9 * LINK * link.gb_per_s if link else math.inf
