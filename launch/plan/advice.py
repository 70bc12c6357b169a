"""What to change about a layout: where most time goes, or where it does not fit. Nothing that the config's checks would
refuse, and nothing that it has already.
"""

from collections.abc import Iterable

from launch.plan.sweep import Candidate, expert_sizes

MOST_CHUNKS = 4  # of an exchange that is tried
WORK = ("activations", "work on one layer", "exchange")  # kinds of memory that grow with the micro-batch
GIVEN = ("context", "fragments")  # kinds that nothing in a config changes


def limit(c: Candidate) -> tuple[str, str]:
    """What takes most time, and what to change about it."""
    parts = c.step.parts
    advice = {"compute": _compute, "recomputation": _recomputation, "launches by the host": _launches,
              "exchange of tokens": _exchange, "gradients on their way": _gradients, "weights on their way": _weights,
              "optimizer": _rarer_updates}
    near = {"compute": sum(parts[k] for k in ("products", "experts", "attention", "between products")),
            "recomputation": parts["computed again"], "launches by the host": parts["waiting for the host"],
            "exchange of tokens": parts["exchange"], "gradients on their way": parts["gradients"],
            "weights on their way": parts["weights"], "optimizer": parts["optimizer"]}
    name = max(near, key=near.get)
    return f"{name} ({near[name] / c.step.seconds:.0%} of the time)", advice[name](c)


def less_memory(c: Candidate) -> str:
    """For one that does not fit."""
    section, layout = c.stage.section, c.layout
    kind = max((kind for kind in c.memory if kind not in GIVEN), key=c.memory.get)
    found = []
    if kind in WORK:
        found += [f"a smaller {section}.micro_batch_size"] * (layout.micro_batch > 1)
        found += [f"{section}.recompute_layers=true"] * (not layout.recompute)
        found = found or ["a smaller model.context_length"]
    elif kind == "engine's buffers":
        found = [f"deepspeed.zero_optimization.reduce_bucket_size={max(1, layout.bucket // 10)}"]
    else:
        larger = [n for n in expert_sizes(c.stage.shape, layout.workers, c.cluster) if n > layout.expert]
        if larger and larger[0] <= c.cluster.gpus_per_node:
            found.append(f"parallel.expert={larger[0]}")
        elif larger:
            found.append(f"parallel.expert={larger[0]} with parallel.across_nodes=true")
        if c.stage.may_share_weights and layout.zero_stage < 3:
            found.append(f"{section}.zero_stage=3")
        elif layout.zero_stage == 1 and layout.workers > 1:
            found.append(f"{section}.zero_stage=2")
        found.append("more workers" if layout.workers < c.cluster.gpus else "a cluster with more GPUs")
    return "it does not fit: " + _either(found)


def _compute(c: Candidate) -> str:
    parts = c.step.parts
    kinds = {"products of matrices": parts["products"], "experts": parts["experts"],
             "attention": parts["attention"], "memory between products": parts["between products"]}
    most = max(kinds, key=kinds.get)
    return f"little in the mesh: most of it is {most}; more GPUs, or fewer tokens, make the run shorter"


def _recomputation(c: Candidate) -> str:
    smaller = f" with a smaller {c.stage.section}.micro_batch_size" if c.layout.micro_batch > 1 else ""
    return f"{c.stage.section}.recompute_layers=false{smaller}, if that fits"


def _launches(c: Candidate) -> str:
    return f"{_larger_micro_batch(c)}: the device waits for work"


def _exchange(c: Candidate) -> str:
    layout, inside = c.layout, c.cluster.gpus_per_node
    found = ["a smaller parallel.expert, that fits into a node" if layout.expert > inside else
             "a smaller parallel.expert, if that fits into memory"]
    if layout.chunks < MOST_CHUNKS:
        found.append(f"parallel.exchange_chunks={2 * layout.chunks}")
    return _either(found)


def _gradients(c: Candidate) -> str:
    """In ZeRO 1 they are sent once an update, in 2 and 3 after every micro-batch."""
    section, layout = c.stage.section, c.layout
    if layout.zero_stage == 2 and layout.accumulation > 1:
        return f"{section}.zero_stage=1, which sends them once an update, if that fits"
    found = [f"{_larger_micro_batch(c)}, so that they are sent less often" if layout.zero_stage == 3
             else _rarer_updates(c)]
    if not layout.overlap:
        found.append("deepspeed.zero_optimization.overlap_comm=true")
    return _either(found)


def _weights(c: Candidate) -> str:
    """In ZeRO 1 and 2 they are gathered once an update, in 3 for each forward and backward."""
    if c.layout.zero_stage < 3:
        return _rarer_updates(c)
    return f"{_larger_micro_batch(c)}, so that each gathering serves more tokens"


def _rarer_updates(c: Candidate) -> str:
    return f"a larger {c.stage.section}.batch_size, so that updates are rarer"


def _larger_micro_batch(c: Candidate) -> str:
    section = c.stage.section
    if c.layout.accumulation > 1:
        return f"a larger {section}.micro_batch_size"
    return f"a larger {section}.micro_batch_size and batch_size"  # all of a rank's share is one micro-batch already


def _either(found: Iterable[str]) -> str:
    return ", or ".join(found)
