"""The canvas of all figures: size, fonts, colours, units, and the two files that a figure becomes.

Colours are those of Okabe & Ito (2008, Color Universal Design), which colour-blind readers tell apart; every series
has a marker of its own, so that a print without colour works too. matplotlib is imported late and without pyplot: no
window, no global state.
"""

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax import records
from lora_jax.ablation import results
from lora_jax.ablation.comparing import axes as axes_of
from lora_jax.ablation.comparing.axes import text, title
from lora_jax.ablation.comparing.groups import Group
from lora_jax.ablation.comparing.statistics import Interval
from lora_jax.ablation.results import Row
from lora_jax.errors import UserError

WIDTH = 3.3  # inches: one column of a page with two
HEIGHT = 2.4
DPI = 300
# Their yellow is left out: too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")
GREY = "#808080"
STYLE: dict[Any, Any] = {
    "font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.5, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.handlelength": 1.8, "legend.columnspacing": 1.2,
}  # fmt: skip
PERCENT = ("accuracy", "f1", "exact_match")
UNITS = {"loss": "nats", "seconds": "s", "peak_memory_mb": "MB", "bleu": "points", "tokens_per_second": "tokens/s"}


class Plot(NamedTuple):
    """The two files of a figure, and what to write under it."""

    png: Path
    csv: Path
    caption: str


def measure(metric: str) -> tuple[str, float]:
    """An axis label with its unit, and the factor from the column to that unit: fractions become percent."""
    name = metric.rsplit(".", 1)[-1]
    words = metric.replace(".", " ").replace("_mb", "").replace("_", " ")
    if any(name.endswith(part) for part in PERCENT):
        return f"{words} (%)", 100.0
    if name == "tokens_per_second":
        return f"{metric.split('.')[0] + ' ' if '.' in metric else ''}speed (tokens/s)", 1.0
    return (f"{words} ({UNITS[name]})" if name in UNITS else words), 1.0


def counts(value: float, _: Any = None) -> str:
    """1200000 -> '1.2M': a count on an axis."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def names(made: Sequence[Group]) -> list[str]:
    """Each group by the axes that tell the groups apart: the value alone where one axis does."""
    by = apart(made)
    if len(by) == 1:
        return [text(g.axes[by[0]]) for g in made]
    return [", ".join(f"{title(name)}={text(g.axes[name])}" for name in by) for g in made]


def apart(made: Sequence[Group]) -> list[str]:
    """The axes that tell groups apart."""
    return axes_of.free([g.axes for g in made]) or list(made[0].axes)


def style(i: int) -> dict[str, Any]:
    """Colour, marker and line of the i-th series. Where the colours begin again, lines change and markers move on."""
    again = i // len(COLOURS)
    marker = MARKERS[(i + again) % len(MARKERS)]
    return {"color": COLOURS[i % len(COLOURS)], "marker": marker, "linestyle": LINES[again % len(LINES)]}


def draw(
    path: str | Path,
    rows: Sequence[Row],
    caption: str,
    paint: Callable[[Any], None],
    height: float = HEIGHT,
    key: str = "",
) -> Plot:
    """Makes the axes, lets `paint` fill them, writes PNG and CSV, each whole or not at all.

    Args:
      path: of the PNG; the CSV lies beside it.
      rows: what the figure shows, in the columns' own units.
      caption: for the figure.
      paint: axes -> None.
      height: in inches, without the legend.
      key: what the legend's entries are values of.
    """
    import matplotlib
    from matplotlib.figure import Figure

    path = Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        figure.set_figheight(height + _legend(figure, axes, key))
        beside = path.with_name(path.name + ".tmp")
        figure.savefig(beside, format="png", dpi=DPI)
        os.replace(beside, path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    records.write_atomic(path.with_suffix(".csv"), results.to_csv(rows, columns))
    return Plot(path, path.with_suffix(".csv"), caption)


def _legend(figure: Any, axes: Any, key: str) -> float:
    """Above the axes, where it hides no data, in as many columns as the width takes. Returns the inches it needs."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return 0.0
    labels = [textwrap.fill(label, 45) for label in labels]
    widest = max(len(part) for label in labels for part in label.split("\n"))
    columns = max(1, min(len(labels), math.floor(WIDTH / (0.45 + 0.062 * widest))))  # a handle; a letter of 7 points
    rows = math.ceil(len(labels) / columns)
    # matplotlib fills columns; a reader reads rows.
    order = [i for c in range(columns) for i in range(c, len(labels), columns)] if rows > 1 else range(len(labels))
    legend = figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper left",
        ncols=columns,
        title=key or None,
        title_fontsize=7,
    )
    legend.set_alignment("left")
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    return 0.15 * (math.ceil(lines) + bool(key))


def line(
    axes: Any,
    at: Sequence[float],
    over: Sequence[Interval],
    scale: float,
    i: int,
    label: str | None,
    band: bool = True,
) -> None:
    """The i-th series: means joined by a line, and a band where there is an interval."""
    some = max(1, math.ceil(len(at) / 8))
    axes.plot(at, [scale * o.mean for o in over], label=label, zorder=3, markevery=some, **style(i))
    low, high = (
        [scale * (o.mean + sign * o.half) if o.half is not None else math.nan for o in over] for sign in (-1, 1)
    )
    if band:
        axes.fill_between(at, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.15, linewidth=0)


def count_axis(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis of counts, with labels between the decades where those alone would be too few."""
    from matplotlib import ticker

    decades = math.log10(max(values) / min(values))
    between = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=between))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(counts))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def numbers(axes: Any, image: Any, grid: Sequence[Sequence[float]]) -> None:
    """Each cell's value in it, black or white, whichever stands out."""
    largest = max(abs(value) for row in grid for value in row if math.isfinite(value))
    digits = max(0, 2 - math.floor(math.log10(largest or 1)))
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center", fontsize=6, color="w" if dark else "k")


def finished(made: Sequence[Group], metric: str) -> list[Group]:
    """The groups with a result.

    Raises:
      UserError: there is none.
    """
    found = [g for g in made if g.values]
    if not found:
        raise UserError(
            f"no finished arm has the metric {metric!r} and what the axes of the figure need: nothing to draw"
        )
    return found


def series(made: Sequence[Group], by: Sequence[str]) -> dict[str, list[Group]]:
    """Groups by the name of their line: the values of `by`; `key` says what they are."""
    lines: dict[str, list[Group]] = {}
    for g in made:
        lines.setdefault(", ".join(text(g.axes[name]) for name in by), []).append(g)
    return lines


def key(by: Sequence[str]) -> str:
    """The legend's title for `series`."""
    return ", ".join(title(name) for name in by)


def point(g: Group, metric: str, level: float, where: Row) -> Row:
    """One row of a figure's CSV."""
    over = g.interval(level)
    low, high = (None, None) if over.half is None else (over.mean - over.half, over.mean + over.half)
    return {**where, metric: over.mean, "low": low, "high": high, "seeds": over.n}


def bands(made: Sequence[Group], level: float, what: str = "Band") -> str:
    """What the bands are, for a caption."""
    if max(len(g.values) for g in made) < 2:
        return "One seed: no intervals."
    return f"{what}: {100 * (1 - level):g} % Student t interval over {seed_counts(made)}."


def seed_counts(made: Sequence[Group]) -> str:
    """'3 seeds' or '1 to 3 seeds'."""
    few, many = min(len(g.values) for g in made), max(len(g.values) for g in made)
    return f"{many} seed{'s' * (many > 1)}" if few == many else f"{few} to {many} seeds"
