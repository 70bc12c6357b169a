"""The drug table: names, brands and MeSH classes of medicines in use.

Most of the table is enzymes, receptors and chemicals, so it is filtered. A name that points to two substances
teaches nothing and is dropped. MeSH parents are chemical, not therapeutic (Oxaprozin is under Oxazoles). The
table's formula may be that of a salt and is not used. No dose is ever written.
"""

import bz2
import collections
import functools
import re
from dataclasses import dataclass

from moe.data.demonstration import packages

PACKAGE = "drug-named-entity-recognition"
NAME_LENGTHS = range(4, 40)
# MeSH branches that hold medicines. A substance there gets a document, but no note orders it.
MEDICINE_BRANCHES = ("D02", "D03", "D04", "D06.347", "D09", "D10")


@dataclass(frozen=True)
class Drug:
    key: str  # the table's lower-case name
    name: str
    classes: tuple[str, ...]  # names of the MeSH parents
    brands: tuple[str, ...]
    synonyms: tuple[str, ...]  # every other name, brands among them
    in_use: bool  # MedlinePlus or the NHS has a page about it

    @property
    def concept(self) -> str:
        return f"drug:{self.key}"

    @property
    def stem(self) -> str:
        """A name with this in it gives the drug away."""
        return self.key[:5]


@functools.cache
def drugs() -> tuple[Drug, ...]:
    """Medicines in use, and substances of the same MeSH branches, by name."""
    packed = packages.locate(PACKAGE, packages.DRUG_PICKLE).read_bytes()
    table = packages.load_pickle(bz2.decompress(packed))
    entries, flags = table["drug_canonical_to_data"], table["drug_variant_to_variant_data"]
    names = collections.defaultdict(list)
    for name, keys in table["drug_variant_to_canonical"].items():
        if len(keys) == 1 and name.isascii() and len(name) in NAME_LENGTHS and "," not in name:
            names[keys[0]].append(name)
    tree = {number: e["name"] for e in entries.values() for number in e.get("mesh_tree", []) if "name" in e}

    out = []
    for key, entry in sorted(entries.items()):
        in_use = _in_use(key, entry)
        if in_use or _listed(entry):
            brands = tuple(sorted(n for n in names[key] if _is_brand(n, key, flags)))
            synonyms = tuple(n for n in names[key] if n != key)
            out.append(Drug(key, entry["name"], _classes(entry, tree), brands, synonyms, in_use))
    return tuple(out)


def _in_use(key: str, entry: dict) -> bool:
    single = key.isascii() and "," not in key and " and " not in key  # one substance, not a combination
    return single and ("medline_plus_id" in entry or "nhs_url" in entry)


def _listed(entry: dict) -> bool:
    numbers = entry.get("mesh_tree", [])
    return "drugbank_id" in entry and any(number.startswith(MEDICINE_BRANCHES) for number in numbers)


def _classes(entry: dict, tree: dict[str, str]) -> tuple[str, ...]:
    parents = {tree.get(number.rpartition(".")[0]) for number in entry.get("mesh_tree", []) if "." in number}
    return tuple(sorted(parent for parent in parents if parent and parent != entry["name"]))


def _is_brand(name: str, key: str, flags: dict) -> bool:
    """The table flags some brands. Others are single words unlike the drug's name and unlike a salt's.

    The second rule lets in some names from other languages.
    """
    if flags.get(name, {}).get("is_brand"):
        return True
    chemical = re.search(r"\d|hydro|sodium|acid|um$", name)
    return key[:5] not in name and not chemical and " " not in name


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
