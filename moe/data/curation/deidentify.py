"""De-identification: what identifies a person is replaced by its type, [DATE], or by a pseudonym, [MRN 5f2c81d09ab4].

presidio looks for it, by patterns alone: identifiers.py, and its own recognisers that check digits or know the world's
telephone numbers. Where a spaCy model is named, people and places that it finds are added; presidio would download one
that is absent, so that is refused first. Nothing here uses the network.

It looks at a copy in plain characters (characters.py), piece by piece (pieces.py). What stays is as it was, but in
Unicode's form NFC.

Needs   The extra `curate`.
Fails   closed: a text that a pattern takes too long for, or that has a find of 256,000 characters, raises TooHard, for
        its row to be left out.
Limits  A pattern finds what it has been told of. No identifier is certain to be gone: look at a sample, and have it
        judged by who answers for it. A pseudonym follows from its value, which 164.514(c) does not allow under Safe
        Harbor: take it under an expert determination, 164.514(b)(1).
"""

import functools
import hashlib
import hmac
import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

from moe.data.curation import pieces
from moe.data.curation import words as ws
from moe.data.curation.characters import composed, plain
from moe.data.curation.identifiers import FORM, LABELLED, PATTERNS, TYPES, WEAK
from moe.data.curation.pieces import Find, overlapping
from moe.data.curation.settings import Deidentify
from moe.errors import InputError

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine, EntityRecognizer

LEAST_KEY = 16  # bytes
PACKAGES = ("presidio_analyzer", "presidio_anonymizer", "datasketch")
LANGUAGE = "en"


class TooHard(Exception):
    """A pattern was given up, so that the text may hold what it looks for."""


def check(section: Deidentify) -> None:
    """Raise InputError where a package, the model or the key is absent. Cheap, but for the model's being found."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"curation needs {package.replace('_', '-')}, which is not installed; install the extra: "
                             "pip install 'polyclinic[curate]'")
    if section.names is not None:
        import spacy

        if not spacy.util.is_package(section.names) and not (Path(section.names) / "meta.json").is_file():
            raise InputError(f"deidentify.names={section.names}: no such spaCy model is installed; install it with "
                             "pip, or give the folder of one")
    if section.key is not None:
        _key(section.key)


class Deidentifier:
    """Call it with a text: the text without what was found, and how many of each type were."""

    def __init__(self, section: Deidentify):
        from presidio_anonymizer import AnonymizerEngine
        from presidio_anonymizer.entities import ConflictResolutionStrategy, OperatorConfig

        check(section)
        self._analyzer = _analyzer(section)
        self._sites_own = bool(section.patterns)
        key = _key(section.key) if section.key else None
        operators = {kind: OperatorConfig("custom", {"lambda": _replacement(kind, key)}) for kind in TYPES}
        self._anonymize = functools.partial(
            AnonymizerEngine().anonymize, operators=operators, merge_entities_with_spaces=False,
            conflict_resolution=ConflictResolutionStrategy.REMOVE_INTERSECTIONS,
        )  # fmt: skip

    def __call__(self, text: str) -> tuple[str, Counter]:
        """Raises TooHard where the text cannot be searched whole."""
        text = composed(text)
        out, counts, rest = [], Counter(), 0
        for group in overlapping(self._finds(text)):
            start, end = group[0].start, max(find.end for find in group)
            replaced = self._replaced(text[start:end], group)
            counts.update(item.entity_type for item in replaced.items)
            out += [text[rest:start], replaced.text]
            rest = end
        return "".join([*out, text[rest:]]), counts

    def _finds(self, text: str) -> list[Find]:
        # A site's own pattern may know a tab, or a wide digit.
        copies = {plain(text), text} if self._sites_own else {plain(text)}
        try:
            return sorted({find for copy in copies for find in pieces.finds(copy, self._search)})
        except pieces.TooLong:
            raise TooHard from None

    def _search(self, text: str) -> list[Find]:
        with _given_up() as given_up:
            results = self._analyzer.analyze(text, LANGUAGE, score_threshold=WEAK)
        if given_up.seen:
            raise TooHard
        return [Find(each.start, each.end, each.entity_type, each.score) for each in results]

    def _replaced(self, text: str, group: list[Find]) -> Any:
        from presidio_analyzer import RecognizerResult

        before = group[0].start
        return self._anonymize(text, [RecognizerResult(kind, start - before, end - before, score)
                                      for start, end, kind, score in group])


class _GivenUp(logging.Handler):
    """Hears that a pattern timed out: presidio says so in its log, and goes on without it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen = False

    def emit(self, record: logging.LogRecord) -> None:
        self.seen |= "timed out" in record.getMessage()


@contextmanager
def _given_up() -> Iterator[_GivenUp]:
    """Hears it meanwhile."""
    logger, handler = logging.getLogger("presidio-analyzer"), _GivenUp()
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


def _key(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"key {path} cannot be read: {error.strerror}") from error
    if len(key) < LEAST_KEY:
        raise InputError(f"key {path} has {len(key)} bytes: want at least {LEAST_KEY} that nobody can guess, such as "
                         "those of: openssl rand -hex 32")
    return key


def _replacement(kind: str, key: bytes | None) -> Any:
    """A function from what was found to what stands in its place. Spelling does not matter to a pseudonym: 555-0100 and
    (555) 0100 have the same, and so has what is as wide as a Chinese character."""

    def pseudonym(value: str) -> str:
        spelled = "".join(filter(str.isalnum, ws.plain(value)))
        return f"[{kind} {hmac.digest(key, f'{kind}|{spelled}'.encode(), hashlib.sha256).hex()[:12]}]"

    return pseudonym if key else lambda value: f"[{kind}]"


def _analyzer(section: Deidentify) -> "AnalyzerEngine":
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.context_aware_enhancers import ContextAwareEnhancer
    from presidio_analyzer.nlp_engine import NerModelConfiguration, NoOpNlpEngine, SpacyNlpEngine
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer
    from presidio_analyzer.recognizer_registry import RecognizerRegistry

    class NoContext(ContextAwareEnhancer):
        """Our patterns hold their labels; presidio's search for them grows with the square of the text."""

        def __init__(self) -> None:
            super().__init__(0, 0, 0, 0)

        def enhance_using_context(self, text: str, raw_results: list, *_: Any, **__: Any) -> list:
            return raw_results

    found = _recognizers(section)
    if section.names is None:
        engine = NoOpNlpEngine([{"lang_code": LANGUAGE, "model_name": "none"}])
    else:
        kinds = {"PERSON": "NAME", "PER": "NAME", "GPE": "ADDRESS", "LOC": "ADDRESS", "FAC": "ADDRESS"}
        engine = SpacyNlpEngine(
            [{"lang_code": LANGUAGE, "model_name": section.names}],
            NerModelConfiguration(model_to_presidio_entity_mapping=kinds, labels_to_ignore=[]),
        )
        found.append(SpacyRecognizer(supported_entities=sorted(set(kinds.values())), ner_strength=FORM))
    try:
        engine.load()
    except (OSError, ValueError, ImportError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"deidentify.names={section.names}: spaCy cannot load it: {said}") from None
    registry = RecognizerRegistry(recognizers=found, supported_languages=[LANGUAGE])
    logging.getLogger("presidio-analyzer").setLevel(logging.WARNING)
    return AnalyzerEngine(registry, engine, supported_languages=[LANGUAGE], context_aware_enhancer=NoContext())


def _recognizers(section: Deidentify) -> "list[EntityRecognizer]":
    """Ours by type, a site's own, and those of presidio that check what they find."""
    from presidio_analyzer import Pattern, PatternRecognizer
    from presidio_analyzer import predefined_recognizers as theirs

    by_kind: dict[str, list[Pattern]] = {}
    for pattern in PATTERNS:
        by_kind.setdefault(pattern.kind, []).append(Pattern(pattern.name, pattern.regex, pattern.score))
    for kind, expression in section.patterns.items():
        by_kind.setdefault(kind, []).append(Pattern("of the site", expression, LABELLED))
    ours = [
        PatternRecognizer(kind, name=kind, patterns=patterns, global_regex_flags=regex.MULTILINE)
        for kind, patterns in by_kind.items()
    ]
    dea = Pattern("DEA", r"\b[ABCDEFGHJKLMPRSTUX][A-Z9]\d{7}\b", WEAK)  # theirs begins within words
    medium = [pattern for pattern in theirs.UsSsnRecognizer.PATTERNS if pattern.score >= WEAK]
    return [
        *ours,
        theirs.UsSsnRecognizer(patterns=medium, supported_entity="SSN"),
        theirs.CreditCardRecognizer(supported_entity="ACCOUNT"),
        theirs.IbanRecognizer(supported_entity="ACCOUNT"),
        theirs.UsMbiRecognizer(supported_entity="PLAN_ID"),
        theirs.UsNpiRecognizer(supported_entity="LICENCE"),
        theirs.MedicalLicenseRecognizer(patterns=[dea], supported_entity="LICENCE"),
        theirs.MacAddressRecognizer(supported_entity="DEVICE"),
        theirs.UuidRecognizer(supported_entity="ID"),
        _phones(),
        _addresses_of_machines(),
    ]


def _phones() -> "EntityRecognizer":
    from presidio_analyzer.predefined_recognizers import PhoneRecognizer

    recognizer = PhoneRecognizer(supported_entity="PHONE", supported_regions=("US",))  # and all that begin with +
    recognizer.SCORE = WEAK
    return recognizer


def _addresses_of_machines() -> "EntityRecognizer":
    from presidio_analyzer.predefined_recognizers import IpRecognizer

    class Ip(IpRecognizer):
        """Version 6; 12:30::5 is no address."""

        def invalidate_result(self, pattern_text: str) -> bool:
            longest = max(map(len, regex.split(r"[:./]", pattern_text)))
            return super().invalidate_result(pattern_text) or ":" not in pattern_text or longest < 3

    return Ip(supported_entity="IP")
