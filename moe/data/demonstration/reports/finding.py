"""What a finding is: the data from which its sentences and labels are made."""

from collections.abc import Mapping
from dataclasses import dataclass

SIZES = ("small", "moderate", "large")
DEGREES = ("mild", "moderate", "severe")


@dataclass(frozen=True)
class Finding:
    """One finding type. The texts have the slots {deg}, {side}, {loc} and {size}."""

    name: str  # its label
    region: str  # the heading under which it is reported
    exams: str  # keys of the exams that may report it
    phrase: str  # as a noun phrase
    observation: str  # as a full sentence
    plain: str  # in everyday words; slot {side} only
    code: str  # ICD-10-CM, complete enough to bill; "right|left" where the code has a side
    sided: bool = False
    noun: str = "single"  # single, plural or mass: the article and the verb that the phrase takes
    locations: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ()  # by side where they have one
    size_mm: tuple[int, int] | None = None  # smallest, largest
    degrees: tuple[str, ...] = ()
    advice: str = ""  # a sentence for the impression

    def code_for(self, side: str) -> str:
        right, _, left = self.code.partition("|")
        return left if left and side == "left" else right

    def locations_on(self, side: str) -> tuple[str, ...]:
        return self.locations[side] if isinstance(self.locations, Mapping) else self.locations
