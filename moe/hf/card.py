"""The card of an exported model: README.md beside its weights, for whoever finds them."""

from pathlib import Path
from typing import Any

from moe.config import ANCHOR_SLOT, ModelConfig

LOAD = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})
```
"""
OWNERS = """
Whose experts are used can be chosen on the loaded model:

```python
model.set_owners(["{owner}"])  # these owners' and the anchor; [] the anchor alone; None everybody's
```

| owner | slot |
|---|---|
"""
STAKEHOLDERS = """
So can how much of what stakeholder groups prefer is used; of groups that are not named nothing is:

```python
model.set_stakeholders({{"{group}": 0.5}})
```

| owner | aligned with |
|---|---|
"""


def card(folder: Path, source: Path, family: str, config: ModelConfig, vocab_size: int, owners: dict[str, int],
         slots: tuple[int, ...], deltas: dict[str, dict[str, int]], dtype: str, lineage: dict[str, str]) -> str:
    """Its text. `lineage` are hashes by what they are of."""
    own = family == "polyclinic"
    lines = ["---", "library_name: transformers", "tags: [polyclinic]", "---", f"# {folder.name}", "",
             "**Not for clinical use.**", "", _what(config, slots, owners), "",
             f"Exported from the Polyclinic model folder `{source.name}` as {_as(family)}, weights in {dtype}.", "",
             "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _sizes(config, vocab_size).items()]
    text = "\n".join(lines) + "\n"
    text += LOAD.format(folder=folder.name, trust=", trust_remote_code=True" if own else "")
    if own:
        text += ("\nThe code beside the weights needs transformers 5.12 or newer; read it before you trust it. Where "
                 "Polyclinic is installed, `moe.hf.architecture.register()` makes it unnecessary.\n")
    if owners:
        text += OWNERS.format(owner=next(iter(owners)))
        text += f"| the anchor | {ANCHOR_SLOT} |\n"
        text += "".join(f"| {name} | {slot} |\n" for name, slot in sorted(owners.items(), key=lambda item: item[1]))
    if deltas:
        text += STAKEHOLDERS.format(group=next(iter(next(iter(deltas.values())))))
        text += "".join(f"| {name} | {', '.join(sorted(groups))} |\n" for name, groups in sorted(deltas.items()))
    text += "\n## Lineage\n\nSHA-256; of every tensor there is one in export.json.\n\n| of | hash |\n|---|---|\n"
    return text + "".join(f"| {name} | `{digest}` |\n" for name, digest in lineage.items())


def _what(config: ModelConfig, slots: tuple[int, ...], owners: dict[str, Any]) -> str:
    if slots:
        return (f"A decoder whose feed-forward networks are mixtures of {len(slots)} experts: the anchor's, and one of "
                f"each of {len(owners)} owners, none of whom has seen another's data. A router sends every token to at "
                f"most {config.top_k} of them.")
    if config.mixture:
        return (f"A decoder whose feed-forward networks are mixtures of {config.mixture.num_experts} experts, "
                f"{config.mixture.top_k} for each token.")
    return "A dense decoder."


def _as(family: str) -> str:
    return "Polyclinic's own architecture" if family == "polyclinic" else f"a model of the family {family}"


def _sizes(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    return {"width": config.d_model, "layers": config.num_layers, "query heads": config.num_heads,
            "key/value heads": config.num_kv_heads, "context, tokens": config.context_length,
            "vocabulary": vocab_size}
