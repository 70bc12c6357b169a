"""Plots of where tokens go, and of what that comes to: of a merged model by owner, of a mixture by domain."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from moe.report.drawing import MAX_NUMBERED, Panel, Plot, bars, heat, heat_scale, over, svg
from moe.report.numerals import decimal, percent

Shares = Mapping[str, Mapping[str, float]]  # text -> expert -> share of routing weight
Loads = Sequence[Sequence[float]]  # layers x experts: the share of tokens' choices; a layer sums to 1
MAX_CELLS = 2048  # of a heat map; of more, lines tell
BASELINES = {
    "anchor_bpb": "anchor",
    "dense_bpb": "dense, all text pooled",
    "pack_bpb": "anchor + own pack",
    "merged_bpb": "merged",
    "without_owner_bpb": "merged, without owner",
}


def baselines(texts: Mapping[str, Mapping[str, float]]) -> Plot:
    """`texts` holds the bits per byte of each text under every model it was measured with."""
    groups = {
        text: {label: row[key] for key, label in BASELINES.items() if key in row} for text, row in texts.items()
    }
    said = "; ".join(
        f"{text}: " + ", ".join(f"{label} {decimal(value)}" for label, value in group.items())
        for text, group in groups.items()
    )
    caption = "The filled bar is the merged model; lower is better."
    return bars("baselines", "Bits per byte against every baseline", "held-out text (bits per byte)", groups,
                f"Bars of held-out bits per byte. {said}.", caption, strong="merged")  # fmt: skip


def share(shares: Shares) -> Plot:
    experts = list(next(iter(shares.values())))

    def draw(figure: Figure) -> None:
        axes, scale = figure.subplots(1, 2, width_ratios=[1, 0.05])
        heat(axes, _rows(shares, experts), experts, 1.0, 9.5, " %", outlined=str.__eq__)
        axes.set(xlabel="expert", ylabel="held-out text of")
        heat_scale(scale, 1.0, "routing weight (%)")

    most = "; ".join(
        f"{text}: " + ", ".join(f"{expert} {percent(value, 0)}" for expert, value in row.items())
        for text, row in shares.items()
    )
    height = 1.4 + 0.42 * min(len(shares), MAX_NUMBERED) + 0.2 * max(len(shares) - MAX_NUMBERED, 0)
    title = "Who answers for which text"
    return Plot(
        title,
        svg("share", title, height, draw, f"Heat map of routing weight by text and expert. {most}."),
        "Share of the routing weight each expert gets, mean over layers and tokens; a row sums to 100\u00a0%, and a "
        "specialty's own expert is outlined.",
    )


def share_by_layer(layers: Mapping[str, Sequence[Mapping[str, float]]]) -> Plot:
    """`layers` holds, for each text, one row of shares a layer."""
    num_layers, crowded = len(next(iter(layers.values()))), len(layers) > MAX_NUMBERED - 2
    experts = list(next(iter(layers.values()))[0])
    columns = 2 if num_layers <= 8 else 4
    rows = math.ceil(num_layers / columns)
    numbered = columns == 2 and not crowded

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(rows, columns + 1, width_ratios=[*[1] * columns, 0.08])
        for layer in range(num_layers):
            row, column = divmod(layer, columns)
            axes = figure.add_subplot(grid[row, column], title=f"layer {layer}")
            axes.title.set_fontsize(9.5)
            of_layer = _rows({text: by_layer[layer] for text, by_layer in layers.items()}, experts)
            heat(axes, of_layer, experts, 1.0, 8 if numbered else 0, outlined=str.__eq__)
            if column or crowded:
                axes.set_yticklabels([])
            if layer + columns < num_layers or crowded:
                axes.set_xticklabels([])
        figure.supxlabel("expert", fontsize=9.5)
        figure.supylabel("held-out text of", fontsize=9.5)
        heat_scale(figure.add_subplot(grid[:, columns]), 1.0, "routing weight (%)")

    own = "; ".join(
        f"{text}: " + ", ".join(percent(row[text], 0) for row in by_layer)
        for text, by_layer in layers.items()
        if text in by_layer[0]
    )
    height = 1.0 + rows * (0.45 + (0.26 if columns == 2 else 0.16) * min(len(layers), MAX_NUMBERED))
    title = "The same, layer by layer"
    said = f"Heat maps of routing weight by layer. Share of a text's own expert, {own}."
    return Plot(
        title,
        svg("share-by-layer", title, height, draw, said),
        "Share of the routing weight in each layer, in per cent; layers are counted from 0, the one nearest the input"
        + (", and rows and columns are those of the plot above." if crowded else "."),
    )


def purity_by_layer(purity: Mapping[str, Sequence[float]], bound: float) -> Plot:
    lines = {name: (list(range(len(by_layer))), [100 * v for v in by_layer]) for name, by_layer in purity.items()}
    bounds = {f"bound, {percent(bound, 0)}": 100 * bound}
    if len(purity) > 1:
        bounds[f"chance, {percent(1 / len(purity), 0)}"] = 100 / len(purity)
    panel = Panel("purity (% of tokens)", lines, marked=True, bounds=bounds, y_limits=(-3, 103))
    said = "; ".join(f"{name}: " + ", ".join(percent(v, 0) for v in by_layer) for name, by_layer in purity.items())
    caption = (
        "Share of a specialty's held-out tokens whose best expert beside the anchor is the specialty's own; the claim "
        "is on the mean over layers."
    )
    title = "Routing purity by layer"
    return over("purity-by-layer", title, "layer", [panel], f"Line plot of routing purity by layer. {said}.", caption,
                first=1)  # fmt: skip


def load_by_layer(loads: Loads, numbers: Sequence[int], step: int) -> Plot:
    """Of the training text of update `step`; `numbers` says which layers of the model these are."""
    num_experts = len(loads[0])
    full = [max(row) for row in loads]
    said = (
        f"Load of each expert in each layer. An even share is {percent(1 / num_experts)}; the fullest expert's by "
        "layer is " + ", ".join(percent(load) for load in full) + "."
    )
    title = "Load of each expert by layer"
    about = f"Share of what tokens chose in update {step:,}, by layer and expert, both counted from 0; a layer sums to "
    about += f"100\u00a0%, and an even share is {percent(1 / num_experts)}."
    if len(loads) * num_experts > MAX_CELLS:
        ranked = [sorted(row, reverse=True) for row in loads]
        parts = {"fullest": 0, "median": num_experts // 2, "emptiest": -1}
        lines = {name: (numbers, [100 * row[place] for row in ranked]) for name, place in parts.items()}
        return over("load", title, "layer", [Panel("load (%)", lines, marked=True)], said, about, first=1)

    def draw(figure: Figure) -> None:
        axes, scale = figure.subplots(1, 2, width_ratios=[1, 0.05])
        experts = [str(number) for number in range(num_experts)]
        heat(axes, dict(zip(map(str, numbers), loads, strict=True)), experts, max(full), 9)
        axes.set(xlabel="expert", ylabel="layer")
        heat_scale(scale, max(full), "load (%)")

    return Plot(title, svg("load", title, _tall(len(loads)), draw, said), about)


def load_by_domain(shares: Mapping[str, Loads], numbers: Sequence[int]) -> Plot | None:
    """`shares` holds the loads of each domain's held-out text; None where there are too many to look at."""
    rows = {
        f"{number}, {domain}": loads[layer] for layer, number in enumerate(numbers) for domain, loads in shares.items()
    }
    num_experts, top = len(next(iter(rows.values()))), max(map(max, rows.values()))
    if len(rows) * num_experts > MAX_CELLS:
        return None

    def draw(figure: Figure) -> None:
        axes, scale = figure.subplots(1, 2, width_ratios=[1, 0.05])
        heat(axes, rows, [str(number) for number in range(num_experts)], top, 9)
        axes.set(xlabel="expert", ylabel="layer, held-out text of")
        heat_scale(scale, top, "load (%)")

    said = "; ".join(f"layer {row}: expert {load.index(max(load))} with {percent(max(load))}"
                     for row, load in rows.items())  # fmt: skip
    title = "Which text uses which expert"
    return Plot(
        title,
        svg("domains", title, _tall(len(rows)), draw, f"Heat map of load by layer, domain, expert. Fullest, {said}."),
        "Share of what the tokens of a domain's held-out text chose, at the end of training; a row sums to 100\u00a0%. "
        "Experts of one number in different layers have nothing to do with each other.",
    )


def specialisation(shares: Mapping[str, Loads], numbers: Sequence[int]) -> Plot:
    """How far the experts that a domain uses are from those that the others use, layer by layer."""
    lines = {}
    for domain, loads in shares.items():
        others = [other for name, other in shares.items() if name != domain]
        apart = []
        for layer, load in enumerate(loads):
            mean = [sum(other[layer][s] for other in others) / len(others) for s in range(len(load))]
            apart.append(50 * sum(abs(a - b) for a, b in zip(load, mean, strict=True)))
        lines[domain] = (numbers, apart)
    if len(shares) == 2:  # they are as far from each other as each other
        lines = {" and ".join(shares): next(iter(lines.values()))}
    panel = Panel("apart (% of choices)", lines, marked=True, y_limits=(0, 100))
    said = "; ".join(f"{name}: " + ", ".join(f"{v:.0f} %" for v in y) for name, (_, y) in lines.items())
    caption = (
        "Share of a domain's choices of experts that would have to change for it to use them as the other domains do, "
        "on held-out text: 0 where domains share all experts, 100 where they share none."
    )
    return over("specialisation", "How far domains are apart, by layer", "layer", [panel],
                f"Line plot by layer. {said}.", caption, first=1)  # fmt: skip


def _rows(shares: Shares, experts: Sequence[str]) -> dict[str, list[float]]:
    return {text: [row[expert] for expert in experts] for text, row in shares.items()}


def _tall(rows: int) -> float:
    return 0.85 + (0.3 * rows if rows <= MAX_NUMBERED else 0.3 * MAX_NUMBERED + 0.09 * (rows - MAX_NUMBERED))
