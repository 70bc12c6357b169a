"""What a check has found, in a line."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "wrong", "skipped"]  # skipped: there is nothing to check here


@dataclass(frozen=True)
class Finding:
    name: str  # of the check
    state: State
    what: str
    mend: str = ""  # with `warning` and `wrong`

    def __post_init__(self) -> None:
        assert bool(self.mend) == (self.state in ("warning", "wrong")), self
