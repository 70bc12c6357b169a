"""The stages of a job: what each depends on and what it makes. The same whoever runs them, so that a run begun under
one launcher goes on under another.

    data-FIRST ──► data-DOMAIN ──► train
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config import JobConfig, UpcycleConfig
from moe.data.prepare import content, model_hashes
from moe.manifest import value_hash
from moe.run_folder import RunFolder

TRAIN = "train"


@dataclass(frozen=True)
class Plan:
    """A stage without the work."""

    name: str
    settings: Any  # plain values that, with the outputs of what it needs, determine what it makes
    needs: tuple[str, ...]
    makes: tuple[Path, ...]
    domain: str | None = None  # of a data stage


def plans(config: JobConfig, run: RunFolder) -> list[Plan]:
    """In an order in which they can be run. Reads the model that is upcycled, for its hash."""
    first, *others = config.domains
    source = _source(config.upcycle) if config.upcycle else None
    seed = config.run.seed
    data = {domain: f"data-{domain}" for domain in config.domains}
    shards = {domain: (run.shards(domain, "train"), run.shards(domain, "eval")) for domain in data}
    tokens = source["tokenizer"] if source else config.tokenizer.vocab_size
    texts = {domain: content(section) for domain, section in config.domains.items()}
    found = [Plan(data[first], [texts[first], tokens, seed], (), (run.tokenizer, *shards[first]), first)]
    found += [Plan(data[name], [texts[name], seed], (data[first],), shards[name], name) for name in others]
    # What only moves roundings is not in it (how many ranks, how they share the work and the state), nor what is passed
    # through to DeepSpeed, which can do no more than that.
    settings = {
        "domains": list(config.domains),  # whose order is that of the documents before they are shuffled
        "model": config.model.model_dump(mode="json"),
        "train": config.train.learned(),
        "balance": config.balance.model_dump(mode="json"),
        "upcycle": source,
        "micro_batch": config.train.micro_batch_size if config.balance.method in ("micro_batch", "global") else None,
        "seed": seed,
        "precision": config.run.precision,
        "backend": config.run.backend,
    }
    return [*found, Plan(TRAIN, settings, tuple(data.values()), (run.model, figures(config, run)))]


def figures(config: JobConfig, run: RunFolder) -> Path:
    """What was measured at the end of the training. Where other text is asked for, the file is another, and the stage,
    which is finished but for that, is done again from its last checkpoint."""
    measured = value_hash(config.evaluation.model_dump(mode="json"))[:12]
    return run.stage(TRAIN) / f"figures-{measured}.json"


def _source(upcycle: UpcycleConfig) -> dict[str, Any]:
    """What a mixture begins with."""
    return {"reinitialise": upcycle.reinitialise, **model_hashes(upcycle.model)}
