"""The report's plots, as SVG to stand inside an HTML page.

Text stays text. Colours are CSS variables of the page (--ink, --line, --heat, --series-0 ...), so that a plot follows
the page into dark mode and print; lines also differ in dashes and markers. The same figures give the same bytes.
Needs the page to style `svg text` with its own font.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from moe.report.numerals import decimal, percent

Rows = Sequence[Mapping[str, Any]]  # of a metrics.jsonl
Shares = Mapping[str, Mapping[str, float]]  # text -> expert -> share of routing weight

WIDTH = 4.4  # inches: a phone's width at a readable size of letters; a wide screen shows two side by side
MAX_POINTS = 300  # of a line; longer ones are averaged over neighbouring steps
MAX_NUMBERED = 8  # experts up to which a heat map has room for numbers
NUM_COLORS = 6
INK, LINE, HEAT = "#00010a", "#00010b", "#00010c"  # stand-ins that become CSS variables
SERIES = [f"#00020{i}" for i in range(NUM_COLORS)]
VARIABLES = {INK: "ink", LINE: "line", HEAT: "heat", **{color: f"series-{i}" for i, color in enumerate(SERIES)}}
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5))]
MARKERS = "osD^vPX"
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two $ is a name
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), LINE),
}


@dataclass(frozen=True)
class Plot:
    title: str
    svg: str
    caption: str


def training_loss(curves: Mapping[str, Rows]) -> Plot:
    """`curves` holds each training stage's rows, the anchor's first."""
    longest = max(len(rows) for rows in curves.values())
    steps = math.ceil(longest / MAX_POINTS)
    lines = {stage: _averaged(rows, math.ceil(len(rows) / MAX_POINTS)) for stage, rows in curves.items()}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="training step", ylabel="loss (nats per token)")
        _draw_lines(axes, lines, marked=False)
        figure.legend(loc="outside lower center", ncols=2)

    mean = f" Each point is the mean of up to {steps} steps." if steps > 1 else ""
    return Plot(
        "Training loss",
        _svg(
            "training-loss",
            _height(lines),
            draw,
            f"Line plot of training loss over steps. {_ends(lines, 'nats per token')}",
        ),
        f"What each job minimises on its own training text; a pack's text holds some public replay.{mean}",
    )


def held_out(curves: Mapping[str, Rows], starts: Mapping[str, float]) -> Plot:
    """`starts` holds, for the stage of each pack, the anchor's bits per byte on the same domain."""
    lines = {
        stage: ([row["step"] for row in rows if "held_out_bpb" in row], _values(rows, "held_out_bpb"))
        for stage, rows in curves.items()
    }

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="training step", ylabel="held-out text (bits per byte)")
        for number, (stage, (steps, values)) in enumerate(lines.items()):
            if stage in starts and steps:
                axes.plot([0, steps[0]], [starts[stage], values[0]], color=_style(number)["color"], linewidth=0.8)
                axes.plot([0], [starts[stage]], linestyle="", **_style(number, hollow=True))
        _draw_lines(axes, lines, marked=True)
        figure.legend(loc="outside lower center", ncols=2)

    return Plot(
        "Held-out bits per byte",
        _svg(
            "held-out",
            _height(lines),
            draw,
            f"Line plot of held-out bits per byte over steps. {_ends(lines, 'bits per byte')}",
        ),
        "Measured during training, before a pack's router is fitted for the last time, on held-out text of each job's "
        "own domain; the hollow marks at step 0 are the anchor on that text, from which a pack starts.",
    )


def share(shares: Shares) -> Plot:
    def draw(figure: Figure) -> None:
        axes, scale = figure.subplots(1, 2, width_ratios=[1, 0.05])
        _draw_heat(axes, shares, 9.5, unit=" %")
        axes.set(xlabel="expert", ylabel="held-out text of")
        _draw_scale(scale)

    most = "; ".join(
        f"{text}: " + ", ".join(f"{expert} {percent(value, 0)}" for expert, value in row.items())
        for text, row in shares.items()
    )
    return Plot(
        "Who answers for which text",
        _svg(
            "share",
            1.4 + 0.42 * min(len(shares), MAX_NUMBERED) + 0.2 * max(len(shares) - MAX_NUMBERED, 0),
            draw,
            f"Heat map of routing weight by text and expert. {most}.",
        ),
        "Share of the routing weight each expert gets, mean over layers and tokens; a row sums to 100\u00a0%, and a "
        "specialty's own expert is outlined.",
    )


def share_by_layer(layers: Mapping[str, Sequence[Mapping[str, float]]]) -> Plot:
    """`layers` holds, for each text, one row of shares a layer."""
    num_layers = len(next(iter(layers.values())))
    columns = 2 if num_layers <= 8 else 4
    rows = math.ceil(num_layers / columns)
    crowded = len(layers) > MAX_NUMBERED

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(rows, columns + 1, width_ratios=[*[1] * columns, 0.08])
        for layer in range(num_layers):
            row, column = divmod(layer, columns)
            axes = figure.add_subplot(grid[row, column], title=f"layer {layer}")
            axes.title.set_fontsize(9.5)
            _draw_heat(axes, {text: by_layer[layer] for text, by_layer in layers.items()}, 7.5 if columns == 2 else 0)
            if column or crowded:
                axes.set_yticklabels([])
            if layer + columns < num_layers or crowded:
                axes.set_xticklabels([])
        figure.supxlabel("expert", fontsize=9.5)
        figure.supylabel("held-out text of", fontsize=9.5)
        _draw_scale(figure.add_subplot(grid[:, columns]))

    own = "; ".join(
        f"{text}: " + ", ".join(percent(row[text], 0) for row in by_layer)
        for text, by_layer in layers.items()
        if text in by_layer[0]
    )
    alternative = f"Heat maps of routing weight by layer. Share of a text's own expert, {own}."
    height = 1.0 + rows * (0.45 + (0.26 if columns == 2 else 0.16) * min(len(layers), MAX_NUMBERED))
    return Plot(
        "The same, layer by layer",
        _svg("share-by-layer", height, draw, alternative),
        "Share of the routing weight in each layer, in per cent; layers are counted from 0, the one nearest the input"
        + (", and rows and columns are those of the plot above." if crowded else "."),
    )


def purity_by_layer(purity: Mapping[str, Sequence[float]], bound: float) -> Plot:
    lines = {name: (list(range(len(by_layer))), [100 * v for v in by_layer]) for name, by_layer in purity.items()}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="layer", ylabel="purity (% of tokens)", ylim=(-3, 103))
        axes.axhline(100 * bound, color=INK, linewidth=1, linestyle=(0, (4, 2)), label=f"bound, {percent(bound, 0)}")
        if len(purity) > 1:
            chance = f"chance, {percent(1 / len(purity), 0)}"
            axes.axhline(100 / len(purity), color=INK, linewidth=1, linestyle=(0, (1, 2)), label=chance)
        _draw_lines(axes, lines, marked=True, first=1)  # 0 is the anchor's style
        figure.legend(loc="outside lower center", ncols=2)

    said = "; ".join(f"{name}: " + ", ".join(percent(v, 0) for v in by_layer) for name, by_layer in purity.items())
    return Plot(
        "Routing purity by layer",
        _svg("purity-by-layer", _height(lines, more=2), draw, f"Line plot of routing purity by layer. {said}."),
        "Share of a specialty's held-out tokens whose best expert beside the anchor is the specialty's own; the claim "
        "is on the mean over layers.",
    )


def _draw_lines(axes: Axes, lines: Mapping[str, tuple[list, list]], marked: bool, first: int = 0) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    for number, (name, (x, y)) in enumerate(lines.items()):
        style = _style(number + first)
        axes.plot(x, y, label=name, **style if marked else style | {"marker": ""})


def _height(lines: Mapping[str, Any], more: int = 0) -> float:
    """Inches for the axes and a legend of two columns."""
    return 2.75 + 0.19 * math.ceil((len(lines) + more) / 2)


def _style(number: int, hollow: bool = False) -> dict[str, Any]:
    """Of the line with this number; 0 is the anchor's."""
    color = SERIES[(number - 1) % NUM_COLORS] if number else INK
    style = {"color": color, "marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[number % len(DASHES)]}
    return {"color": color, "marker": style["marker"], "markerfacecolor": "none"} if hollow else style


def _draw_heat(axes: Axes, shares: Shares, font_size: float, unit: str = "") -> None:
    """One cell for each text and expert, with its number where `font_size` is not 0 and there is room."""
    experts = list(next(iter(shares.values())))
    for y, (text, row) in enumerate(shares.items()):
        for x, expert in enumerate(experts):
            own = {"edgecolor": INK, "linewidth": 1.2, "zorder": 2} if expert == text else {"edgecolor": "none"}
            value = row[expert] if math.isfinite(row[expert]) else 0.0
            axes.add_patch(Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, facecolor=(HEAT, min(value, 1.0)), **own))
            if font_size and len(experts) <= MAX_NUMBERED:
                axes.text(
                    x + 0.5, y + 0.5, f"{100 * value:.0f}{unit}", ha="center", va="center", fontsize=font_size, zorder=3
                )
    axes.set(xlim=(0, len(experts)), ylim=(len(shares), 0))
    slant = {"rotation": 35 if len(experts) <= MAX_NUMBERED else 90, "ha": "right", "rotation_mode": "anchor"}
    slant["va"] = "top" if len(experts) <= MAX_NUMBERED else "center"
    axes.set_xticks([x + 0.5 for x in range(len(experts))], experts, **slant)
    axes.set_yticks([y + 0.5 for y in range(len(shares))], list(shares))
    _bare(axes)


def _draw_scale(axes: Axes) -> None:
    """The heat map's key: full colour is all of the weight."""
    levels = 20
    for level in range(levels):
        axes.add_patch(
            Rectangle((0, level / levels), 1, 1 / levels, facecolor=(HEAT, (level + 0.5) / levels), edgecolor="none")
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], ylabel="routing weight (%)")
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100"])
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _values(rows: Rows, key: str) -> list[float]:
    """What is not finite becomes a gap in the line."""
    return [row[key] if math.isfinite(row[key]) else math.nan for row in rows if key in row]


def _averaged(rows: Rows, steps: int) -> tuple[list[int], list[float]]:
    """Every `steps` losses as their mean, at the last of their steps."""
    losses = _values(rows, "loss")
    groups = [losses[i : i + steps] for i in range(0, len(losses), steps)]
    return [rows[min(i + steps, len(rows)) - 1]["step"] for i in range(0, len(rows), steps)], [
        sum(group) / len(group) for group in groups
    ]


def _ends(lines: Mapping[str, tuple[list, list]], unit: str) -> str:
    """Where each line starts and ends, in words."""
    said = [f"{name} from {decimal(y[0], 2)} to {decimal(y[-1], 2)}" for name, (_, y) in lines.items() if y]
    return f"{'; '.join(said)} {unit}."


def _svg(name: str, height: float, draw: Any, alternative: str) -> str:
    """Draw into a figure of WIDTH x `height` inches. `name` keeps its ids apart from those of other plots."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc would change the page
        matplotlib.rcParams.update({**SETTINGS, "svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    box = re.search(r'viewBox="[^"]*"', svg).group()
    alternative = alternative.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg {box} role="img" aria-label="{alternative}">' + svg[svg.index(">") + 1 :].strip()
