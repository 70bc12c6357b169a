"""From a YAML file and `key=value` overrides to a checked config; every refusal names its key.

A file may say `extends: other.yaml` (or a list), relative to itself: the other is read first and this one
laid over it, key by key. Overrides are laid over last. An owner set to null is left out.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from moe.config import JobConfig, RunConfig, SpecialtyConfig
from moe.errors import InputError


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and check. Raises InputError with one sentence for each thing that is wrong."""
    merged = _read(path, seen=())
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise InputError(f"override {override!r}: want key=value, such as anchor.steps=100")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise InputError(f"override {override!r} does not fit the config: {_first_line(error)}") from error
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {_first_line(error)}") from error
    if isinstance(owners := values.get("owners"), dict):
        values["owners"] = {name: owner for name, owner in owners.items() if owner is not None}
    return check(values)


def check(values: dict[str, Any]) -> RunConfig:
    """Build a config from plain values; what pydantic says becomes sentences that name the key.

    With `train` it is one training job, otherwise a specialty run."""
    kind = JobConfig if "train" in values else SpecialtyConfig
    if kind is SpecialtyConfig and "anchor" not in values and "owners" not in values:
        raise InputError("the config has neither owners nor train: want owners and anchor for a specialty run, or "
                         "train and domains for one training job")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        sentences = dict.fromkeys(_sentence(kind, e) for e in error.errors(include_url=False))
        raise InputError("; ".join(sentences)) from error


def dump(config: RunConfig) -> str:
    """The whole config as YAML, defaults included; `load` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in seen:
        raise InputError(f"{path} extends itself: {' -> '.join(p.name for p in (*seen, path))}")
    try:
        own = OmegaConf.load(path)
    except OSError as error:
        raise InputError(f"config {path} cannot be read: {error.strerror}") from error
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} is not YAML: {_first_line(error)}") from error
    if not isinstance(own, DictConfig):
        raise InputError(f"config {path} is a list: want sections with keys")
    parents = own.pop("extends", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, Sequence) or not all(isinstance(parent, str) for parent in parents):
        raise InputError(f"config {path}: extends={parents}: want a file or a list of files")
    layers = [_read(path.parent / parent, (*seen, path)) for parent in parents]
    try:
        return OmegaConf.merge(*layers, own)
    except TypeError as error:
        raise InputError(f"config {path} does not fit what it extends: {_first_line(error)}") from error


def _sentence(kind: type[RunConfig], error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _known_keys(kind, error["loc"][:-1]), n=1)
        hint = f"; did you mean {'.'.join([*map(str, error['loc'][:-1]), near[0]])}?" if near else ""
        return f"{key}: no such key{hint}"
    if error["type"] == "missing":
        return f"{key} is missing: it has no default and must be given"
    if error["type"] == "value_error":  # our own validators: the sentence already names the key and the value
        own = str(error["ctx"]["error"])
        return own if not key or own.startswith(key.split(".")[0]) else f"{key}: {own}"
    return f"{key}={error['input']!r}: {error['msg'].lower().replace('input should be', 'want')}"


def _known_keys(kind: type[RunConfig], loc: Sequence[str | int]) -> list[str]:
    """The keys of the section at `loc`; a dict of sections is stepped through by any name."""
    section: Any = kind
    for part in loc:
        field = section.model_fields.get(part) if _is_section(section) else None
        annotation = field.annotation if field else section
        section = next((a for a in (annotation, *get_args(annotation)) if _is_section(a)), annotation)
    return list(section.model_fields) if _is_section(section) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
