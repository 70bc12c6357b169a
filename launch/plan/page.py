"""A plan on the terminal: for each stage what it is, what the config as written takes, and which mesh is best."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(found: dict[str, Any], console: Console) -> None:
    cluster, rates = found["cluster"], found["rates"]
    nodes = "one node" if cluster["nodes"] == 1 else f"{cluster['nodes']} nodes"
    unchecked = "" if rates["sustained_is_fitted"] else f"; no published run on {rates['generation']} was checked"
    _say(console, f"{cluster['name']}: {cluster['gpus']} GPUs of kind {rates['device']} on {nodes}; rates: "
                  f"{rates['source']}{unchecked}")
    _say(console, f"how far off a plan can be: {rates['expect']}")
    for stage in found["stages"]:
        _stage(stage, console)


def _stage(stage: dict[str, Any], console: Console) -> None:
    counts = stage["parameters"]
    _say(console, f"\n{stage['name']}: {_count(counts['total'])} parameters, {_count(counts['active'])} active, "
                  f"{_count(counts['trained'])} trained; {stage['training_flops_per_token'] / 1e9:.3g} GFLOP a token; "
                  f"{_count(stage['tokens'])} tokens in all")
    written, best = stage["as_written"], stage["best"]
    if written is None:
        _say(console, f"as written: {stage['obstacle']}")
    shown = {"as written": written, "best": best} if written else {"best": best}
    console.print(_memory(shown))
    console.print(_time(shown))
    console.print(_sweep(stage))
    if stage["what_if"]:
        _say(console, "the best mesh if: " + "; ".join(map(_what_if, stage["what_if"])))
    for name, one in shown.items():
        _say(console, f"{name}: " + ("limited by " + one["limit"] if one["fits"] else "needs "
                                     f"{_size(one['memory_bytes'])} of {_size(one['memory_of_device'])}")
             + f"; to change: {one['change']}")
    _say(console, "write: " + " ".join(f"{key}={_value(value)}" for key, value in best["keys"].items()))


def _memory(shown: dict[str, dict[str, Any]]) -> Table:
    table = Table("memory of a GPU", *shown, title_justify="left")
    for kind in next(iter(shown.values()))["memory"]:
        table.add_row(kind, *(_size(one["memory"][kind]) for one in shown.values()))
    table.add_row("in all", *(_size(one["memory_bytes"]) + ("" if one["fits"] else " TOO MUCH") for one in
                              shown.values()), style="bold")
    return table


def _time(shown: dict[str, dict[str, Any]]) -> Table:
    table = Table("an update", *shown)
    for kind in next(iter(shown.values()))["parts_s"]:
        table.add_row(kind, *(f"{one['parts_s'][kind]:.4g} s ({one['parts_s'][kind] / one['step_s']:.0%})"
                              for one in shown.values()))
    table.add_row("in all", *(f"{one['step_s']:.4g} s" for one in shown.values()), style="bold")
    for kind in ("exchange", "gradients", "weights"):
        table.add_row(f"a GPU sends: {kind}", *(f"{_size(one['traffic'][kind])}, {one['traffic'][kind + '_s']:.3g} s"
                                                for one in shown.values()))
    table.add_row("MFU (of the data sheet)", *(f"{one['mfu']:.1%}" for one in shown.values()))
    table.add_row("tokens a day", *(_count(one["tokens_per_day"]) for one in shown.values()))
    table.add_row("cost of 10^9 tokens", *(_money(one["cost_per_billion_tokens"]) for one in shown.values()))
    table.add_row("the whole run", *(f"{one['run_s'] / 3600:.3g} h, {_money(one['run_cost'])}" for one in
                                     shown.values()))
    return table


def _sweep(stage: dict[str, Any]) -> Table:
    table = Table("GPUs", "expert", "ZeRO", "again", "micro", "chunks", "GB", "tokens/s", "MFU", "cost",
                  title=f"{stage['num_fitting']} layouts fit; the fastest of each mesh, and the cheapest",
                  box=box.SIMPLE, pad_edge=False)
    for one in [*stage["sweep"], *([stage["cheapest"]] if stage["cheapest"] not in stage["sweep"] else [])]:
        table.add_row(str(one["workers"]), str(one["expert"]), str(one["zero_stage"]), "yes" if one["recompute"] else
                      "no", str(one["micro_batch"]), str(one["chunks"]), f"{one['memory_bytes'] / 1e9:.1f}",
                      _count(one["tokens_per_s"]), f"{one['mfu']:.1%}", _money(one["cost_per_billion_tokens"]),
                      style="bold" if one == stage["best"] else None)
    return table


def _what_if(case: dict[str, Any]) -> str:
    what = {"skew": f"experts' loads follow Zipf {case['value']:g} (the fullest rank has {case['fullest_rank']:.2f} "
                    "times the mean)",
            "slowdown": f"ranks are slower by {case['value']:.0%} on average"}[case["kind"]]
    return f"{what}, {case['times_slower']:.2f} times as long" + ("" if case["fits"] else " and TOO MUCH memory")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _money(number: float | None) -> str:
    return "no price given" if number is None else f"{number:,.2f}"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
