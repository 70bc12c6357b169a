"""Where everything of a run lies; the one place that spells its paths.

    runs/NAME/config.yaml          as resolved, defaults included
    runs/NAME/manifest.json        versions, commit, hash of the config
    runs/NAME/tokenizer.json       trained on the first domain's text, or that of the model which a job begins with, and
                                   tokenizer_config.json with it
    runs/NAME/stages/STAGE/        what a stage made; DONE when it is finished, with the hash of its inputs
    runs/NAME/packs/OWNER/         pack.safetensors, pack.json
    runs/NAME/model/               what all of it was for, in Hugging Face layout: the merged model, or a job's
    runs/NAME/results.json, report.html (of a specialty run)
    runs/NAME/ray/                 what Ray Train keeps of its jobs, until the run ends
"""

from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "eval", "calibration")  # of a domain's text; the last of public text in a specialty run only


@dataclass(frozen=True)
class RunFolder:
    path: Path

    def stage(self, name: str) -> Path:
        return self.path / "stages" / name

    def shards(self, domain: str, split: str) -> Path:
        return self.stage(f"data-{domain}") / split

    def pack(self, owner: str) -> Path:
        return self.path / "packs" / owner

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def anchor(self) -> Path:
        return self.stage("anchor") / "model"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"
