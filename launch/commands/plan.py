"""`polyclinic plan`: what a config needs and costs on a cluster. Needs no GPU and no cluster."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/mixture-8gpu.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as train.micro_batch_size=1.")] = None,
    cluster: Annotated[Path, typer.Option(help="A cluster's YAML file, such as configs/clusters/8xh100.yaml.")] = ...,
    skew: Annotated[float, typer.Option(min=0.0, max=5.0, help="Zipf exponent of the experts' popularity.")] = 0.0,
    slowdown: Annotated[float, typer.Option(min=0.0, max=10.0, help="Mean share by which ranks are slower.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulated routing and ranks.")] = 0,
    measured: Annotated[list[Path] | None, typer.Option(help="Results of our benchmarks on such a GPU, for its "
                                                             "rates.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Say what CONFIG takes on a cluster: memory, traffic, time, MFU and cost, what limits it, and which mesh is best.

    Example: polyclinic plan configs/mixture-64gpu.yaml --cluster configs/clusters/64xh100-infiniband.yaml
    """
    from launch.plan import cluster as clusters
    from launch.plan import page
    from launch.plan.answer import answer
    from launch.plan.measured import applied
    from launch.plan.sweep import Assumptions, stages
    from moe.config_file import load

    target = clusters.load(cluster)
    wanted = stages(load(config, overrides or []), target)
    device = applied(target.kind, target.device, measured) if measured else target.kind
    found = answer(wanted, target, device, Assumptions(skew, slowdown, seed))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        page.show(found, Console())
