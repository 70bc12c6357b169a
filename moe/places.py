"""Paths taken out of what is told of a run to others: of /home/someone/data/reports.jsonl only …/reports.jsonl is left.

Where folders lie says who works on which machine, and may say whose text it is. In running text a path ends at a space,
unless it stands in quotation marks; a value that is a path ends where it ends.
"""

import re
from typing import Any

_PART = r"[^\s/\\:;,'\"()\[\]]+"
_QUOTED = re.compile(r"(?P<quote>['\"])(?:file://|[\w.-]+:)?[/~](?!/)[^'\"]*/(?P<last>[^'\"/]*)(?P=quote)")
# That begins at the root, at a home, at a drive or on another host, with all but its last part; not of a URL, not a/b.
_PLACE = re.compile(rf"(?:file://|(?<![\w/.…~:-])(?:~[\w.-]*|[A-Za-z]:|[\w.-]+:(?=/[^/\s]))?)[/\\](?:{_PART}[/\\])+")
_HOME = re.compile(rf"(?<![\w…])(?:/home|/Users)/{_PART}(?![^\s:;,'\"()\[\]])")  # whose last part is somebody's name
_WHOLE = re.compile(r"[/~]|\.\.[/\\]|[A-Za-z]:[/\\]|file://")


def without_places(text: str) -> str:
    text = _QUOTED.sub(r"\g<quote>…/\g<last>\g<quote>", _HOME.sub("…", text))
    return _PLACE.sub("…/", text)


def placeless(value: Any) -> Any:
    """The same for plain values, of which some are paths."""
    if isinstance(value, dict):
        return {key: placeless(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [placeless(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if _WHOLE.match(value) and not _HOME.fullmatch(value):
        return "…/" + re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return without_places(value)
