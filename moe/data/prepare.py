"""Prepare a domain's text for training: read, split, and pack it; for the public domain, train the tokenizer first."""

from typing import Any

from moe.config import PUBLIC, SpecialtyConfig
from moe.data import sources, tokenizer
from moe.manifest import value_hash
from moe.run_folder import RunFolder


def prepare(config: SpecialtyConfig, run: RunFolder, domain: str) -> dict[str, Any]:
    """Write stages/data-DOMAIN/{train,eval}, for the public domain also calibration and tokenizer.json.

    Returns plain values: the hash of the packed splits and their counts. Reads no other owner's data."""
    source = config.public if domain == PUBLIC else config.owners[domain].data
    folder = run.stage(f"data-{domain}")
    splits = sources.read(domain, source, folder, config.run.seed)
    if domain == PUBLIC:
        made = tokenizer.train((row.text for row in splits["train"]), config.tokenizer.vocab_size)
        made.save(str(run.tokenizer))
    manifests = sources.pack(splits, folder, tokenizer.load(run.tokenizer))
    return {
        "hash": value_hash({split: manifest["files"] for split, manifest in manifests.items()}),
        "tokenizer": manifests["train"]["tokenizer"],
        **{
            f"{split}_{count}": manifest[count]
            for split, manifest in manifests.items()
            for count in ("documents", "tokens", "bytes")
        },
    }
