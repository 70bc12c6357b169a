"""Shell code: the files beside this one, word for word, and the variables that they begin with."""

import shlex
from collections.abc import Mapping
from importlib.resources import files


def body(name: str) -> str:
    """Of a file such as job.sh."""
    return files("launch.cluster").joinpath(name).read_text(encoding="utf-8")


def assignments(variables: Mapping[str, object]) -> list[str]:
    """A line for each; what is in a value is quoted."""
    return [f"{name}={shlex.quote(str(value))}" for name, value in variables.items()]
