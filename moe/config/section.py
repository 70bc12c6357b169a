"""What all sections share: frozen, strict, no unknown keys; and the types and names that several use."""

import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
FilePath = Annotated[Path, Field(strict=False)]

NAME = re.compile(r"[a-z][a-z0-9_]*")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def with_absolute_paths(self) -> Self:
        """The same for a process with another working directory."""
        return self.model_copy(update={name: _absolute(value) for name, value in self})


def _absolute(value: Any) -> Any:
    if isinstance(value, Path):
        return value.resolve()
    if isinstance(value, Section):
        return value.with_absolute_paths()
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    if isinstance(value, dict):
        return {name: _absolute(each) for name, each in value.items()}
    return value
