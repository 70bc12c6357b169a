"""What a curation does, as a YAML file may say it: four sections, of which one that is null is left out.

    deidentify: {names: en_core_web_sm, patterns: {MRN: '\\bH\\d{8}\\b'}}
    filter: {min_words: 20}
    deduplicate: null
"""

from pathlib import Path
from typing import Annotated, Any, Self

import regex
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, field_validator

from moe.config.section import FilePath, Section
from moe.data.curation.identifiers import TYPES
from moe.errors import InputError

Share = Annotated[float, Field(ge=0, le=1)]


class Deidentify(Section):
    """Replace what HIPAA's Safe Harbor lists, 45 CFR 164.514(b)(2)(i), as far as it is text."""

    names: str | None = None  # an installed spaCy model, or its folder, that knows people and places
    key: FilePath | None = None  # pseudonyms of a hash with this file's bytes in the place of plain placeholders
    patterns: dict[str, str] = {}  # a site's own formats: regular expression by type

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: dict[str, str]) -> dict[str, str]:
        for kind, pattern in patterns.items():
            if kind not in TYPES:
                raise ValueError(f"patterns.{kind}: want one of {', '.join(TYPES)}")
            try:
                found = regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"patterns.{kind}={pattern!r} is no regular expression: {error}") from error
            if found.match(""):
                raise ValueError(f"patterns.{kind}={pattern!r} matches nothing at all, and so would everywhere")
        return patterns


class Filter(Section):
    """Rules of Gopher, arXiv:2112.11446 appendix A1 and table A1, wider than there: code lists and templated notes are
    terse, full of numbers, and say the same thing often. Gopher's own values stand beside ours."""

    min_words: NonNegativeInt = 5  # 50
    max_words: PositiveInt = 200_000  # 100,000
    # Characters, 3 to 10.
    mean_word_length: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Field(strict=False)] = (2.5, 12.0)
    min_letter_share: Share = 0.5  # of words, that have a letter: 0.8
    min_words_for_repetition: PositiveInt = 50  # a shorter text repeats its phrases by chance
    max_repeated_lines: Share = 0.5  # of lines, that stood before: 0.3; and of their characters: 0.2
    max_commonest_phrase: Share = 0.4  # of characters, in the commonest 2, 3 or 4 words: 0.20, 0.18, 0.16
    max_repeated_runs: Share = 0.75  # of characters, in runs of 10 words that stood before: 0.10
    max_damage: Share = 0.001  # of characters, that are U+FFFD, control characters or wrongly decoded


class Deduplicate(Section):
    """The first of several rows stays: exact ones by their normalised text, near ones by Jaccard similarity."""

    near: bool = True
    shingle_words: PositiveInt = 5
    jaccard: Annotated[float, Field(gt=0, le=1)] = 0.8
    seed: NonNegativeInt = 1  # of MinHash's permutations


class Decontaminate(Section):
    """Remove rows that share a run of words with an evaluation item, as GPT-3 did: arXiv:2005.14165 appendix C."""

    words: PositiveInt = 13
    short_words: PositiveInt = 8  # for items that have fewer than `words`
    # A run of words that stands in more rows than this is a common phrase, not a copy of an item, unless a row has half
    # of the item's; null: none is.
    max_rows: PositiveInt | None = 10


class Settings(Section):
    deidentify: Deidentify | None = Deidentify()
    filter: Filter | None = Filter()
    deduplicate: Deduplicate | None = Deduplicate()
    decontaminate: Decontaminate | None = Decontaminate()
    columns: Annotated[tuple[str, ...], Field(strict=False)] = ()  # to keep beside those of every row; not looked into

    def changed(self, **deidentify: Any) -> Self:
        """The same with other values in `deidentify`."""
        if self.deidentify is None:
            given = ", ".join(deidentify)
            raise InputError(f"deidentify is null in the config, and {given} is given: want one of them")
        return self.model_copy(update={"deidentify": self.deidentify.model_copy(update=deidentify)})


def load(path: Path) -> Settings:
    """Raises InputError with one sentence for each thing that is wrong."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} is not YAML: {str(error).splitlines()[0]}") from error
    try:
        return Settings.model_validate({} if values is None else values)
    except ValidationError as error:
        sentences = [f"config {path}: {_sentence(each)}" for each in error.errors(include_url=False)]
        raise InputError("; ".join(sentences)) from error


def _sentence(error: dict[str, Any]) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    return f"{key or 'it'}={error['input']!r}: {error['msg'].lower().replace('input should be', 'want')}"


