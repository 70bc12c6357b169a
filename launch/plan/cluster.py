"""A cluster as a few numbers, from a YAML file such as those in configs/clusters.

A node is what fast links join: eight GPUs with NVLink in most machines, 72 in a GB200 NVL72.
"""

from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from launch.plan.rates import DEVICES, Device
from moe.config import Section
from moe.errors import InputError

Number = Annotated[PositiveFloat, Field(strict=False)]  # YAML writes 450 where 450.0 is meant


class Link(Section):
    """Of one GPU, in each direction at once."""

    gb_per_s: Number  # of the data sheet
    latency_us: Annotated[NonNegativeFloat, Field(strict=False)] = 10.0  # of one message


class Cluster(Section):
    name: str
    device: str  # a key of launch.plan.rates.DEVICES
    nodes: PositiveInt
    gpus_per_node: PositiveInt
    node_link: Link | None = None  # between the GPUs of a node
    network: Link | None = None  # between nodes
    memory_gb: Number | None = None  # of a GPU; null: the device's
    price_per_gpu_hour: Annotated[NonNegativeFloat, Field(strict=False)] | None = None  # in whatever currency you pay

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r}: want one of {', '.join(sorted(DEVICES))}")
        if self.gpus_per_node > 1 and self.node_link is None:
            raise ValueError(f"gpus_per_node={self.gpus_per_node}: want node_link.gb_per_s as well, the speed of the "
                             "links between a node's GPUs")
        if self.nodes > 1 and self.network is None:
            raise ValueError(f"nodes={self.nodes}: want network.gb_per_s as well, the speed of the links between nodes")
        return self

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def kind(self) -> Device:
        return DEVICES[self.device]

    @property
    def memory_bytes(self) -> float:
        return 1e9 * (self.memory_gb or self.kind.memory_gb)

    def spread(self, ranks: int) -> tuple[int, int]:
        """(nodes, ranks on each) of so many consecutive ranks; a partial node counts with as many as fill all alike."""
        nodes = -(-ranks // self.gpus_per_node)
        return nodes, -(-ranks // nodes)


def load(path: Path) -> Cluster:
    """Raises InputError naming the key, its value and what was wanted."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cluster {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cluster {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise InputError(f"cluster {path} has no keys: want name, device, nodes, gpus_per_node and links, as in "
                         "configs/clusters")
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        unknown = [".".join(map(str, e["loc"])) for e in found if e["type"] == "extra_forbidden"]
        said = [_sentence(e) for e in found if e["type"] != "extra_forbidden"]
        if unknown:
            said.append(f"{', '.join(unknown)}: no such key; want some of {', '.join(Cluster.model_fields)}")
        raise InputError(f"cluster {path}: " + "; ".join(said)) from error


def _sentence(error: dict) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{key} is missing: it has no default and must be given"
    return f"{key}={error['input']!r}: {error['msg'].lower().replace('input should be', 'want')}"
