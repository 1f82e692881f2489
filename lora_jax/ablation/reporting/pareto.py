"""The metric against trained parameters, and which arms nothing smaller beats. A figure as those of plots.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.ablation.comparing import axes as axes_of
from lora_jax.ablation.comparing import groups, verdicts
from lora_jax.ablation.comparing.statistics import LEVEL
from lora_jax.ablation.reporting import figure
from lora_jax.ablation.reporting.figure import Plot
from lora_jax.ablation.results import Row
from lora_jax.errors import UserError


def pareto(
    rows: Sequence[Row],
    path: str | Path,
    metric: str,
    *,
    by: Sequence[str] | None = None,
    better: str | None = None,
    level: float = LEVEL,
) -> Plot:
    """The metric against the number of trained parameters, and the front: what nothing smaller is better than.

    Args:
      rows: of `results.read_results`.
      path: of the PNG.
      metric: a column.
      by: the columns that tell the colours apart; by default the method where it varies, else all is one colour.
      better: 'max' or 'min' where the metric's name does not say.
      level: 1 - confidence of the bars.

    Raises:
      UserError: nothing to show, or no arm says its number of trained parameters.
    """
    better = verdicts.better_is(metric, better)
    made = [g for g in figure.finished(groups.grouped(rows, metric), metric) if g.trainable_params]
    if not made:
        raise UserError("no finished arm has trainable_params above 0: there is nothing to draw against")
    by = [name for name in axes_of.varying(rows) if name == "adapter.method"] if by is None else list(by)
    best = front([(g.trainable_params, g.interval().mean) for g in made], better)
    names = {g.label: name for name, part in figure.series(made, by).items() for g in part}
    extra = [{"group": g.label, "series": names[g.label], "front": i in best} for i, g in enumerate(made)]
    out = [figure.point(g, metric, level, {"trainable_params": g.trainable_params, **e}) for g, e in zip(made, extra)]
    label, scale = figure.measure(metric)

    def paint(axes: Any) -> None:
        for i, (name, part) in enumerate(figure.series(made, by).items()):
            over = [g.interval(level) for g in part]
            at, mean = [g.trainable_params for g in part], [scale * o.mean for o in over]
            look = {**figure.style(i), "linestyle": "none"}
            axes.plot(at, mean, label=name or None, zorder=3, **look)
            bars = [scale * (o.half or 0.0) for o in over]
            axes.errorbar(at, mean, bars, fmt="none", ecolor=look["color"], elinewidth=0.6, capsize=1.5, zorder=2)
        stairs = sorted((made[i].trainable_params, scale * made[i].interval().mean) for i in best)
        right = (max(g.trainable_params for g in made), stairs[-1][1])
        axes.step(*zip(*stairs, right), where="post", color=figure.GREY, lw=0.8, zorder=1, label="front")
        figure.count_axis(axes, [g.trainable_params for g in made])
        axes.set(xlabel="trainable parameters", ylabel=label)

    caption = f"{label} against trainable parameters. Line: the front of the means. {figure.bands(made, level, 'Bar')}"
    return figure.draw(path, out, caption, paint, key=figure.key(by))


def front(points: Sequence[tuple[float, float]], better: str) -> list[int]:
    """Indices of (size, metric) points that no other beats: none is as good and smaller, or better and no larger."""
    sign = 1 if better == "max" else -1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1]))
    best, found = float("-inf"), []
    for i in order:
        if sign * points[i][1] > best:
            best = sign * points[i][1]
            found.append(i)
    return sorted(found)
