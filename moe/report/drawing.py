"""What the report's plots are drawn with: lines over updates or layers, bars, heat maps, as SVG inside an HTML page.

Text stays text. Colours are CSS variables of the page (--ink, --line, --heat, --series-0 ...), so that a plot follows
the page into dark mode and print; lines also differ in dashes and markers, and have their names at their ends. Every
plot has a title and a description in words. The same figures give the same bytes.
Needs the page to style `svg text` with its own font.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

WIDTH = 4.4  # inches: a phone's width at a readable size of letters; a wide screen shows two side by side
MAX_POINTS = 300  # of a line; longer ones are averaged over neighbouring steps
MAX_NUMBERED = 8  # columns up to which a heat map has room for numbers
MAX_LEVEL, MAX_TURNED = 9, 16  # names of a heat map's columns, as they are and turned
MAX_NAMED, MAX_NAME = 8, 14  # lines, and letters of a name, up to which names stand at the lines' ends
MAX_IN_TWO, MAX_LETTERS = 16, 28  # letters of a name up to which a legend has two columns, and it is shown whole
LINE_INCHES = 0.165  # of text
MARK_INCHES = 0.72  # that the name of a mark needs
HEADROOM = 1.06  # so that a line does not lie on the frame
LEVELS = 20  # of a heat map's colour
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

Curve = tuple[Sequence[float], Sequence[float]]  # x, y; a gap where y is not finite


@dataclass(frozen=True)
class Plot:
    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Panel:
    """One of the axes that a plot has above each other."""

    label: str  # of the y axis
    lines: Mapping[str, Curve]
    marked: bool = False  # whether every point has a marker
    starts: Mapping[str, float] = field(default_factory=dict)  # y at x = 0 that is another model's, by line
    bounds: Mapping[str, float] = field(default_factory=dict)  # y of horizontal lines, by name
    y_limits: tuple[float, float | None] | None = None  # without the upper one a little more than the lines need


@dataclass(frozen=True)
class Mark:
    """Something that happened at an x."""

    x: float
    name: str


def over(name: str, title: str, x_label: str, panels: Sequence[Panel], said: str, caption: str,
         marks: Sequence[Mark] = (), first: int = 0) -> Plot:  # fmt: skip
    """Lines over one x axis. `said` is what they show, in words; `first` is the style of a panel's first line, of which
    0 is the anchor's."""
    names = list(dict.fromkeys(name for panel in panels for name in (*panel.lines, *panel.bounds)))
    styles = {name: _style(number + first) for number, name in enumerate(names)}
    several = any(len(panel.lines) + len(panel.bounds) > 1 for panel in panels)
    if not several:
        styles = {name: style | {"linestyle": "-"} for name, style in styles.items()}
    named = len(names) <= MAX_NAMED and max(map(len, names), default=0) <= MAX_NAME
    tall = max(1.6 if len(panels) > 1 else 2.35, 0.3 + LINE_INCHES * len(names) * (several and named))
    columns = 2 if max(map(len, names), default=0) <= MAX_IN_TWO else 1
    legend = 0.19 * math.ceil(len(names) / columns) * (several and not named)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(grid, panels, strict=True):
            axes.set_ylabel(panel.label)
            for bound, y in panel.bounds.items():
                axes.axhline(y, color=INK, linewidth=1, linestyle=(0, (4, 2)), label=_short(bound))
            for line, (x, y) in panel.lines.items():
                style, y = styles[line], [value if math.isfinite(value) else math.nan for value in y]
                if line in panel.starts and len(x):
                    axes.plot([0, x[0]], [panel.starts[line], y[0]], color=style["color"], linewidth=0.8)
                    axes.plot([0], [panel.starts[line]], linestyle="", **_hollow(style))
                alone = sum(map(math.isfinite, y)) == 1
                axes.plot(x, y, label=_short(line), **style if panel.marked or alone else style | {"marker": ""})
            if panel.y_limits:
                low, high = panel.y_limits
                axes.set_ylim(low, low + HEADROOM * ((_highest(panel) - low) or 1.0) if high is None else high)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        _draw_marks(grid, marks)
        if several and named:
            for axes, panel in zip(grid, panels, strict=True):
                _name_ends(axes, panel, tall - 0.3, styles)
        elif several:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
        figure.align_ylabels()

    inches = len(panels) * tall + 0.55 + 0.2 * bool(marks) + legend
    return Plot(title, svg(name, title, inches, draw, said), caption)


def bars(name: str, title: str, x_label: str, groups: Mapping[str, Mapping[str, float]], said: str, caption: str,
         strong: str) -> Plot:  # fmt: skip
    """A group of named bars for each text, each with its number; those named `strong` are the ones to look at."""
    rows = sum(len(group) + 1 for group in groups.values())

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel=x_label)
        y, ticks, most = 0, {}, max(v for group in groups.values() for v in group.values() if math.isfinite(v))
        for text, group in groups.items():
            axes.text(0, y + 0.12, text, fontweight="bold", va="center")
            for bar, value in group.items():
                y += 1
                ticks[y] = bar
                style = {"facecolor": SERIES[0]} if bar == strong else {"facecolor": "none", "edgecolor": INK}
                wide = value if math.isfinite(value) else 0.0
                axes.add_patch(Rectangle((0, y - 0.36), wide, 0.72, linewidth=0.9, **style))
                axes.text(wide + 0.012 * most, y, f"{value:.3f}" if wide else "not finite", va="center", fontsize=9)
            y += 1
        axes.set(xlim=(0, 1.14 * most), ylim=(y - 0.4, -0.6))
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)

    return Plot(title, svg(name, title, 0.6 + 0.2 * rows, draw, said), caption)


def heat(axes: Axes, rows: Mapping[str, Sequence[float]], columns: Sequence[str], top: float, font_size: float,
         unit: str = "", outlined: Callable[[str, str], bool] = lambda row, column: False) -> None:  # fmt: skip
    """One cell for each row and column, in full colour from `top` on, with its number in per cent where `font_size` is
    not 0 and there is room."""
    cells: dict[int, list[Path]] = {}
    for y, (row, values) in enumerate(rows.items()):
        for x, (column, value) in enumerate(zip(columns, values, strict=True)):
            level = round(LEVELS * min(value / top, 1.0)) if math.isfinite(value) else 0
            cells.setdefault(level, []).append(Path.unit_rectangle().transformed(_cell(x, y)))
            if font_size and len(columns) <= MAX_NUMBERED:
                said = f"{100 * value:.0f}{unit}" if math.isfinite(value) else "–"
                axes.text(x + 0.5, y + 0.5, said, ha="center", va="center", fontsize=font_size, zorder=3)
            if outlined(row, column):
                axes.add_patch(Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, facecolor="none", edgecolor=INK,
                                         linewidth=1.2, zorder=2))  # fmt: skip
    for level, paths in sorted(cells.items()):  # of one colour in one path: a page may have thousands
        if level:
            joined = Path.make_compound_path(*paths)
            axes.add_patch(PathPatch(joined, facecolor=(HEAT, level / LEVELS), edgecolor="none"))
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    columns, names = [_short(column) for column in columns], [_short(row) for row in rows]
    slanted = max(map(len, columns)) > 3
    every = math.ceil(len(columns) / (MAX_TURNED if slanted else MAX_LEVEL))
    places = range(0, len(columns), every)
    turn = {"rotation": 35, "ha": "right", "va": "top", "rotation_mode": "anchor"} if slanted else {}
    turn |= {"rotation": 90, "va": "center"} if slanted and len(columns) > MAX_NUMBERED else {}
    axes.set_xticks([x + 0.5 for x in places], [columns[x] for x in places], **turn)
    every = math.ceil(len(rows) / 24)
    axes.set_yticks([y + 0.5 for y in range(0, len(rows), every)], names[::every])
    _bare(axes)


def heat_scale(axes: Axes, top: float, label: str) -> None:
    """A heat map's key."""
    for level in range(LEVELS):
        axes.add_patch(
            Rectangle((0, level / LEVELS), 1, 1 / LEVELS, facecolor=(HEAT, (level + 0.5) / LEVELS), edgecolor="none")
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], ylabel=label)
    axes.set_yticks([0, 0.5, 1], [f"{100 * share * top:.3g}" for share in (0, 0.5, 1)])
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()
    _bare(axes)


def averaged(x: Sequence[float], y: Sequence[float]) -> Curve:
    """At most MAX_POINTS, each the mean of its neighbours and at the last of them; what is no number is left out."""
    some = math.ceil(len(x) / MAX_POINTS) or 1
    groups = [[v for v in y[i : i + some] if math.isfinite(v)] for i in range(0, len(y), some)]
    ends = [x[min(i + some, len(x)) - 1] for i in range(0, len(x), some)]
    return ends, [sum(group) / len(group) if group else math.nan for group in groups]


def svg(name: str, title: str, height: float, draw: Callable[[Figure], None], said: str) -> str:
    """Draw into a figure of WIDTH x `height` inches. `name` keeps its ids apart from those of other plots."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc would change the page
        matplotlib.rcParams.update({**SETTINGS, "svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'(url\(|href=")#', rf"\1#{name}-", drawn).replace("xlink:href", "href")
    drawn = re.sub(r"font-family: [^;\"]*;? ?", "", drawn)
    drawn = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", drawn)
    drawn = re.sub(r"font: bold ([\d.]+px)[^;\"]*", r"font-weight: bold; font-size: \1", drawn)
    drawn = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{2,}", _rounded, tag.group()), drawn)
    drawn = re.sub(r"\s*\n\s*", " ", drawn)
    for color, variable in VARIABLES.items():
        drawn = drawn.replace(color, f"var(--{variable})")
    box = re.search(r'viewBox="[^"]*"', drawn).group()
    ids = f"{name}-title", f"{name}-said"
    return (
        f'<svg {box} role="img" aria-labelledby="{ids[0]}" aria-describedby="{ids[1]}">'
        f'<title id="{ids[0]}">{escape(title)}</title><desc id="{ids[1]}">{escape(said)}</desc>'
        + drawn[drawn.index(">") + 1 :].strip()
    )


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number.group()):.2f}".rstrip("0").rstrip(".")


def _cell(x: int, y: int) -> Any:
    return matplotlib.transforms.Affine2D().scale(0.96).translate(x + 0.02, y + 0.02)


def _draw_marks(grid: Sequence[Axes], marks: Sequence[Mark]) -> None:
    """Dotted lines through all axes, with their names above the first where there is room beside each other."""
    low, high = grid[-1].get_xlim()
    room = (high - low) * MARK_INCHES / (WIDTH - 1.2)
    free = -math.inf
    for mark in sorted(marks, key=lambda mark: mark.x):
        for axes in grid:
            axes.axvline(mark.x, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        if mark.x >= free:
            side = "right" if mark.x > high - room else "left" if mark.x < low + room / 2 else "center"
            grid[0].annotate(mark.name, (mark.x, 1), (0, 2), xycoords=("data", "axes fraction"),
                             textcoords="offset points", ha=side, fontsize=8.5)  # fmt: skip
            free = mark.x + room
    grid[-1].set_xlim(low, high)


def _name_ends(axes: Axes, panel: Panel, inches: float, styles: Mapping[str, dict[str, Any]]) -> None:
    """Names right of the axes, each as near to the height of its line's end as the others allow."""
    ends = {bound: (axes.get_xlim()[1], y) for bound, y in panel.bounds.items()}
    for name, (x, y) in panel.lines.items():
        known = [(at, value) for at, value in zip(x, y, strict=True) if math.isfinite(value)]
        if known:
            ends[name] = known[-1]
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    gap, beside = (high - low) * LINE_INCHES / inches, 0.03 * (right - left)
    order = sorted(ends, key=lambda name: ends[name][1])
    for name, height in zip(order, _spread([ends[name][1] for name in order], gap, low, high), strict=True):
        x, y = ends[name]
        color = INK if name in panel.bounds else styles[name]["color"]
        (leader,) = axes.plot([x, right + beside], [y, height], linewidth=0.7, color=color, clip_on=False, zorder=1)
        leader.set_in_layout(False)
        axes.text(right + 1.4 * beside, height, name, va="center", fontsize=9)
    axes.set(xlim=(left, right), ylim=(low, high))


def _short(name: str) -> str:
    """With what it begins and ends with, where it is too long."""
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 12]}…{name[-11:]}"


def _highest(panel: Panel) -> float:
    values = [value for _, y in panel.lines.values() for value in y if math.isfinite(value)]
    return max(values, default=panel.y_limits[0])


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising numbers near those wanted, which rise too, at least `gap` apart and inside the limits if they fit."""
    placed = []
    for want in wanted:
        placed.append(max(want, placed[-1] + gap if placed else low + gap / 2))
    ceiling = high - gap / 2
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _style(number: int) -> dict[str, Any]:
    """Of the line with this number; 0 is the anchor's."""
    color = SERIES[(number - 1) % NUM_COLORS] if number else INK
    return {"color": color, "marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[number % len(DASHES)]}


def _hollow(style: Mapping[str, Any]) -> dict[str, Any]:
    return {"color": style["color"], "marker": style["marker"], "markerfacecolor": "none"}


def _bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
