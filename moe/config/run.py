"""The run itself: its name, its seed, in which precision and by which kernels it computes."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import NonNegativeInt, model_validator

from moe.config.section import FilePath, Section

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunSection(Section):
    name: str  # of the folder under `folder` that holds everything the run makes
    folder: FilePath = Path("runs")
    seed: NonNegativeInt
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the hardware has it
    # Of the kernels; auto: the device's fastest; megablocks: that, but for a mixture's experts.
    backend: Literal["auto", "triton", "torch", "reference", "megablocks"] = "auto"

    @model_validator(mode="after")
    def _name_is_a_folder(self) -> Self:
        if not RUN_NAME.fullmatch(self.name):
            raise ValueError(f"run.name={self.name!r}: want letters, digits, '.', '_' or '-'")
        return self

    @property
    def path(self) -> Path:
        return self.folder / self.name


class TrackingConfig(Section):
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "polyclinic"
