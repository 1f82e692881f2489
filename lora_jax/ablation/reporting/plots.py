"""Figures for a paper: PNG at half a page's width, and beside each the CSV with what it shows.

Bands and bars are Student t intervals over seeds; a mean of one seed has none, and the caption says so. Nothing has a
title: the caption comes with the result.
"""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_jax import records
from lora_jax.ablation.comparing import groups
from lora_jax.ablation.comparing.axes import text, title, values, varying
from lora_jax.ablation.comparing.groups import Group
from lora_jax.ablation.comparing.statistics import LEVEL
from lora_jax.ablation.reporting import figure
from lora_jax.ablation.reporting.figure import Plot
from lora_jax.ablation.results import Row
from lora_jax.errors import UserError

MOST_BANDS = 4  # of learning curves, which lie close to each other


def metric_by_rank(
    rows: Sequence[Row],
    path: str | Path,
    metric: str,
    *,
    x: str = "adapter.rank",
    by: Sequence[str] | None = None,
    level: float = LEVEL,
) -> Plot:
    """The metric against the rank on a logarithmic axis, one line with its band per value of the other axes.

    Args:
      rows: of `results.read_results`.
      path: of the PNG.
      metric: a column.
      x: the column with the rank, or any other positive number. Arms without one (another method) are not shown.
      by: the columns that tell the lines apart; by default every axis that varies besides `x`.
      level: 1 - confidence of the band.

    Raises:
      UserError: nothing to show, a rank that is no positive number, or arms that `by` does not tell apart.
    """
    shown = [row for row in rows if row.get(x) is not None]
    for row in shown:
        if not isinstance(row[x], (int, float)) or row[x] <= 0:
            raise UserError(f"{x} must be a positive number on a logarithmic axis, the arm {row['arm']} has {row[x]!r}")
    by = [name for name in varying(shown) if name != x] if by is None else list(by)
    made = figure.finished(groups.grouped(shown, metric, [x, *by]), metric)
    lines = {name: sorted(part, key=lambda g: g.axes[x]) for name, part in figure.series(made, by).items()}
    out = [figure.point(g, metric, level, {x: g.axes[x], "series": name}) for name, part in lines.items() for g in part]
    label, scale = figure.measure(metric)
    key = figure.key(by) if len(lines) > 1 else ""

    def paint(axes: Any) -> None:
        for i, (name, part) in enumerate(lines.items()):
            at = [g.axes[x] for g in part]
            figure.line(axes, at, [g.interval(level) for g in part], scale, i, name if len(lines) > 1 else None)
        ticks = sorted({g.axes[x] for g in made})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.set(xlabel=title(x), ylabel=label)

    return figure.draw(path, out, f"{label} against {title(x)}. {figure.bands(made, level)}", paint, key=key)


def heat_map(
    rows: Sequence[Row], path: str | Path, metric: str, *, x: str = "adapter.targets", y: str = "adapter.layers"
) -> Plot:
    """The mean over seeds for every layer and matrix; a cell without a result is empty.

    Args:
      rows: of `results.read_results`.
      path: of the PNG.
      metric: a column.
      x: the column of the matrices.
      y: the column of the layers, of which the first is at the bottom, as in the model; of another column it is on top.

    Raises:
      UserError: nothing to show, or arms that the two columns do not tell apart.
    """
    made = figure.finished(groups.grouped(rows, metric, [x, y]), metric)
    across, up = (values(row.get(name) for row in rows) for name in (x, y))
    cells = {(text(g.axes[x]), text(g.axes[y])): g.interval().mean for g in made}
    out = [figure.point(g, metric, LEVEL, {x: g.axes[x], y: g.axes[y]}) for g in made]
    label, scale = figure.measure(metric)
    grid = [[cells.get((a, b), float("nan")) * scale for a in across] for b in up]

    def paint(axes: Any) -> None:
        image = axes.imshow(grid, cmap="cividis", origin="lower" if y.endswith("layers") else "upper", aspect="auto")
        axes.set_facecolor("#DDDDDD")
        axes.set_xticks(range(len(across)), across)
        axes.set_yticks(range(len(up)), up)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel=title(x), ylabel=title(y))
        axes.figure.colorbar(image, label=label, fraction=0.08, pad=0.02)
        if len(across) <= 8:
            figure.numbers(axes, image, grid)

    seeds = figure.seed_counts(made)
    caption = f"{label}, mean over {seeds}, by {title(y)} and {title(x)}; grey: no result."
    return figure.draw(path, out, caption, paint, height=max(1.8, 0.8 + 0.2 * len(up)))


def read_curves(runs: Iterable[tuple[str, Any, str | Path]]) -> list[Row]:
    """(label, seed, path of a metrics.jsonl) of each run -> rows for `learning_curves`."""
    return [{"label": label, "seed": seed, **row} for label, seed, path in runs for row in records.read_jsonl(path)]


def learning_curves(
    rows: Sequence[Row], path: str | Path, metric: str, *, split: str = "dev", level: float = LEVEL, key: str = ""
) -> Plot:
    """The metric while training: per label the mean over seeds with its band.

    Args:
      rows: of `read_curves`: `label`, `seed`, `step`, `split`, metrics.
      path: of the PNG.
      metric: as in metrics.jsonl ('accuracy').
      split: 'train' or 'dev'.
      level: 1 - confidence of the band.
      key: what the labels are values of, over the legend.

    Raises:
      UserError: nothing to show.
    """
    lines: dict[str, dict[int, dict[Any, float]]] = {}
    for row in rows:
        if row["split"] == split and row.get(metric) is not None:
            lines.setdefault(row["label"], {}).setdefault(row["step"], {})[row["seed"]] = row[metric]
    if not lines:
        raise UserError(
            f"no row of the split {split!r} has the metric {metric!r}: there are no learning curves to draw"
        )
    made = [Group(name, {"step": at}, found) for name, steps in lines.items() for at, found in sorted(steps.items())]
    out = [figure.point(g, f"{split}.{metric}", level, {"series": g.label, "step": g.axes["step"]}) for g in made]
    label, scale = figure.measure(f"{split}.{metric}")

    def paint(axes: Any) -> None:
        for i, name in enumerate(lines):
            part = [g for g in made if g.label == name]
            over = [g.interval(level) for g in part]
            shown = name if len(lines) > 1 else None
            figure.line(axes, [g.axes["step"] for g in part], over, scale, i, shown, band=len(lines) <= MOST_BANDS)
        axes.set(xlabel="step (updates)", ylabel=label)

    many = f"Means over {figure.seed_counts(made)}; the intervals are in the CSV."
    bands = figure.bands(made, level) if len(lines) <= MOST_BANDS else many
    return figure.draw(path, out, f"{label} while training. {bands}", paint, key=key)


def dots(
    made: Sequence[Group], path: str | Path, metric: str, *, base: Group | None = None, level: float = LEVEL
) -> Plot:
    """One line per group: its mean and interval; a dotted line through the baseline's mean.

    Args:
      made: groups of one metric, the first on top; those without a result are not shown.
      path: of the PNG.
      metric: what their values are.
      base: the baseline.
      level: 1 - confidence of the bars.

    Raises:
      UserError: nothing to show.
    """
    shown = figure.finished(made, metric)
    out = [figure.point(g, metric, level, {"group": g.label}) for g in shown]
    by = figure.apart(shown)
    label, scale = figure.measure(metric)

    def paint(axes: Any) -> None:
        up = range(len(shown) - 1, -1, -1)
        mean, half = ([scale * v for v in part] for part in zip(*((o.mean, o.half or 0.0) for o in
                      (g.interval(level) for g in shown))))  # fmt: skip
        axes.errorbar(mean, up, xerr=half, fmt="o", color=figure.COLOURS[0], elinewidth=0.8, capsize=2, zorder=3)
        if base is not None and base.values:
            axes.axvline(scale * base.interval(level).mean, color=figure.GREY, lw=0.8, ls=":", zorder=1)
        axes.set_yticks(up, [textwrap.fill(name, 28) for name in figure.names(shown)])
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel=label, ylabel=title(by[0]) if len(by) == 1 else "", ylim=(-0.6, len(shown) - 0.4))

    line = f" Dotted: the baseline, {base.label}." if base is not None and base.values else ""
    caption = f"{label} of every choice. {figure.bands(shown, level, 'Bar')}{line}"
    return figure.draw(path, out, caption, paint, height=0.7 + 0.17 * len(shown))
