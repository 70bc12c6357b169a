"""Where documents come from."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from moe.config.section import FilePath, Section


class DataConfig(Section):
    """Where documents come from: exactly one of the three sources."""

    demonstration: Literal["public", "billing", "radiology", "pharmacology"] | None = None
    documents: Annotated[tuple[FilePath, ...], Field(strict=False)] = ()  # .jsonl or .parquet with a `text` column
    noise_documents: PositiveInt | None = None  # so many documents of random words: for control experiments
    held_out: Annotated[tuple[FilePath, ...], Field(strict=False)] = ()  # with `documents`; empty: split by hash
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.08  # of `documents`, where `held_out` is empty
    max_characters: PositiveInt | None = None  # cap on the demonstration's training documents

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [
            name
            for name, value in (
                ("demonstration", self.demonstration),
                ("documents", self.documents),
                ("noise_documents", self.noise_documents),
            )
            if value
        ]
        if len(given) != 1:
            raise ValueError(
                f"data has {' and '.join(given) or 'no source'}: want exactly one of demonstration, documents, "
                "noise_documents"
            )
        if self.held_out and not self.documents:
            raise ValueError("data.held_out is given without data.documents: want both or neither")
        if self.max_characters and not self.demonstration:
            raise ValueError(
                f"data.max_characters={self.max_characters}: want it with data.demonstration, the only source it caps"
            )
        return self
