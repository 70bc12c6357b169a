"""The answer of a plan as plain values, for --json and for the page alike. Bytes, seconds, tokens, GPUs.

Currency is that of the cluster's price.
"""

from dataclasses import asdict, replace
from typing import Any

from launch.plan.advice import less_memory, limit
from launch.plan.cluster import Cluster
from launch.plan.rates import EXPECT, FITTED, SUSTAINED, Device
from launch.plan.sweep import Assumptions, Candidate, Stage, as_written, obstacle, sweep

SHOWN = 8  # of the sweep's candidates
SKEWS, SLOWDOWNS = (0.0, 0.3, 0.6, 1.0), (0.02, 0.05)


def answer(stages: list[Stage], cluster: Cluster, device: Device, assumptions: Assumptions) -> dict[str, Any]:
    return {
        "schema": 1,
        "cluster": cluster.model_dump(mode="json") | {"gpus": cluster.gpus},
        "rates": rates(cluster, device),
        "assumptions": asdict(assumptions),
        "stages": [_stage(stage, cluster, device, assumptions) for stage in stages],
    }


def rates(cluster: Cluster, device: Device) -> dict[str, Any]:
    return {
        "device": cluster.device, **device._asdict(), "sustained": SUSTAINED[device.generation],
        "sustained_is_fitted": device.generation in FITTED,
        "source": "measured on our kernels: " + ", ".join(device.measured) + "; the rest published" if device.measured
                  else "published shares of the data sheet's peak, none measured on our kernels",
        "expect": EXPECT,
    }


def _stage(stage: Stage, cluster: Cluster, device: Device, assumptions: Assumptions) -> dict[str, Any]:
    written = as_written(stage, cluster, device, assumptions)
    best_first = sweep(stage, cluster, device, assumptions)
    best = best_first[0]
    cheapest = min(best_first, key=lambda c: c.layout.workers * c.step.seconds / c.step.tokens)
    shape, context = stage.shape, stage.layout.context
    return {
        "name": stage.name,
        "parameters": {"total": shape.parameters, "active": shape.active_parameters,
                       "trained": shape.trained_parameters, "experts": shape.expert_parameters},
        "training_flops_per_token": shape.training_flops(context),
        "tokens": stage.steps * stage.train.batch_size * context,
        "as_written": written and candidate(written),
        "obstacle": obstacle(stage, cluster),
        "num_fitting": len(best_first),
        "best": candidate(best),
        "cheapest": candidate(cheapest),
        "sweep": [candidate(c) for c in _various(best_first)[:SHOWN]],
        "what_if": _what_if(best),
    }


def _various(best_first: list[Candidate]) -> list[Candidate]:
    """Of each mesh and each choice of recomputation the fastest."""
    found: dict[tuple, Candidate] = {}
    for c in best_first:
        found.setdefault((c.layout.workers, c.layout.expert, c.layout.zero_stage, c.layout.recompute), c)
    return list(found.values())


def candidate(c: Candidate) -> dict[str, Any]:
    step, layout = c.step, c.layout
    tokens = c.stage.steps * step.tokens
    cost, (limited_by, change) = c.cost_per_billion_tokens, limit(c)
    return {
        "keys": c.keys(),
        "workers": layout.workers, "expert": layout.expert, "micro_batch": layout.micro_batch,
        "accumulation": layout.accumulation, "zero_stage": layout.zero_stage, "recompute": bool(layout.recompute),
        "chunks": layout.chunks, "fullest_rank": c.fullest,
        "fits": c.fits, "memory_bytes": c.bytes_needed, "memory": c.memory, "memory_of_device": c.cluster.memory_bytes,
        "step_s": step.seconds, "parts_s": step.parts, "traffic": vars(step.traffic),
        "tokens_per_s": step.tokens_per_s, "tokens_per_day": 86400 * step.tokens_per_s, "mfu": step.mfu(c.device),
        "cost_per_billion_tokens": cost, "run_s": c.stage.steps * step.seconds,
        "run_cost": None if cost is None else cost * tokens / 1e9,
        "limit": limited_by, "change": change if c.fits else less_memory(c),
    }


def _what_if(best: Candidate) -> list[dict[str, Any]]:
    """How much slower the best mesh is where routing is skewed or ranks are slow, and whether it still fits."""
    found, base = [], best.assumptions
    cases = [("skew", {"skew": s}) for s in SKEWS if s > base.skew] if best.layout.expert > 1 else []
    cases += [("slowdown", {"slowdown": m}) for m in SLOWDOWNS if m > base.slowdown] if best.layout.workers > 1 else []
    for kind, change in cases:
        other = replace(best, assumptions=Assumptions(**{**asdict(base), **change}))
        found.append({"kind": kind, "value": change[kind], "fullest_rank": other.fullest, "fits": other.fits,
                      "times_slower": other.step.seconds / best.step.seconds})
    return found
