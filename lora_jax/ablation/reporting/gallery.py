"""Which figures a grid gets, chosen by the axes that vary.

| what varies | figure |
|---|---|
| `adapter.rank`, `train.learning_rate` | the metric against it, a line per value of the other axes, at most 7 |
| two of layers, targets, rank (the first two of these); a learning rate with too many lines | a heat map |
| one axis without an order; or every choice at its best learning rate | a dot and interval each |
| trainable parameters, by a tenth or more | the Pareto front |
| anything | learning curves: the metric on dev, or the training loss where dev was looked at once |

Where more axes vary than a figure can tell apart, there is one figure per value of those axes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import records
from lora_jax.ablation import results
from lora_jax.ablation.comparing import axes, groups, search
from lora_jax.ablation.comparing.groups import Group
from lora_jax.ablation.comparing.search import OVER, Best
from lora_jax.ablation.reporting import figure, pareto, plots
from lora_jax.ablation.reporting.figure import Plot
from lora_jax.ablation.results import Row
from lora_jax.errors import UserError

METHOD, RANK, LAYERS, TARGETS = "adapter.method", "adapter.rank", "adapter.layers", "adapter.targets"
MAPS = ((TARGETS, LAYERS), (RANK, LAYERS), (RANK, TARGETS))
MOST_LINES = len(figure.COLOURS)
MOST_PANELS = 6
MOST_DOTS = 40
SAME_BUDGET = 1.1  # the largest over the smallest size; below, sizes were meant to be equal


class Gallery:
    """Draws into one folder; `plots` in their order, `notes` on what was not drawn."""

    def __init__(self, workdir: str | Path, folder: str | Path, metric: str, better: str):
        """Nothing is drawn yet.

        Args:
          workdir: of the grid, with `runs/<arm>/metrics.jsonl`.
          folder: for the figures.
          metric: what they show.
          better: 'max' or 'min'.
        """
        self.workdir, self.folder, self.metric, self.better = Path(workdir), Path(folder), metric, better
        self.plots: list[Plot] = []
        self.notes: list[str] = []

    def fill(
        self,
        rows: Sequence[Row],
        made: Sequence[Group],
        base: Group | None,
        found: Sequence[Best] = (),
        judge: str = "",
    ) -> None:
        """Draws all that applies.

        Args:
          rows: of `results.read_results`.
          made: the groups that the report judges, at their best learning rate where it was searched.
          base: the one of them that the others are compared with.
          found: of `search.search` where the learning rate was searched.
          judge: the metric that `made` has, if it is another one.
        """
        names = axes.free(rows)
        for x, name in ((RANK, "rank"), (OVER, "learning_rate")):
            self._lines(rows, names, x, name)
        self._maps(rows, names)
        best = search.at_best(rows, found) if found else rows
        self._dots(best, names, made, base, judge if found else "")
        self._pareto(best)
        self._curves(best, base.axes if base else {})

    def _panels(
        self, name: str, rows: Sequence[Row], over: Sequence[str], paint: Callable[[list[Row], Path], Plot]
    ) -> None:
        """One figure per combination of values of `over`."""
        parts = axes.split(rows, over)
        for i, (what, part) in enumerate(parts[:MOST_PANELS]):
            path = self.folder / (f"{name}.png" if len(parts) == 1 else f"{name}_{i + 1}.png")
            try:
                plot = paint(part, path)
            except UserError as error:
                self.notes.append(f"{path.name} was not drawn{f' ({what})' if what else ''}: {error}")
            else:
                caption = (f"{what}: " if what else "") + plot.caption + self._left_out(part)
                self.plots.append(plot._replace(caption=caption))
        if len(parts) > MOST_PANELS:
            rest = "; ".join(what for what, _ in parts[MOST_PANELS:])
            self.notes.append(f"{name}: {len(parts) - MOST_PANELS} more of these figures were not drawn ({rest})")

    def _left_out(self, rows: Sequence[Row]) -> str:
        count = sum(not groups.counts(row, self.metric) for row in rows)
        return f" Without {count} arm{'s' * (count > 1)} that failed." if count else ""

    def _lines(self, rows: Sequence[Row], names: Sequence[str], x: str, name: str) -> None:
        shown = axes.positive(rows, x)
        if x not in names or axes.count(shown, [x]) < 2:
            return
        by, over = apart(shown, [n for n in axes.free(shown) if n != x])
        if axes.count(shown, by) <= MOST_LINES:
            self._panels(
                name, shown, over, lambda part, path: plots.metric_by_rank(part, path, self.metric, x=x, by=by)
            )

    def _maps(self, rows: Sequence[Row], names: Sequence[str]) -> None:
        pairs = [pair for pair in MAPS if set(pair) <= set(names)][:1]
        if OVER in names and not any(plot.png.stem.startswith("learning_rate") for plot in self.plots):
            pairs += [(OVER, other) for other in names if other not in (OVER, RANK)][:1]
        for x, y in pairs:
            stem = "_by_".join(axes.title(name).replace(" ", "_") for name in (y, x))
            shown = axes.positive(rows, x) if x in (RANK, OVER) else list(rows)
            over = [name for name in axes.free(shown) if name not in (x, y)]
            draw = lambda part, path: plots.heat_map(part, path, self.metric, x=x, y=y)  # noqa: E731, B023
            self._panels(stem, shown, over, draw)

    def _dots(
        self, rows: Sequence[Row], names: Sequence[str], made: Sequence[Group], base: Group | None, judge: str
    ) -> None:
        unordered = len(names) == 1 and axes.count(axes.positive(rows, names[0]), names) < axes.count(rows, names)
        wanted = judge or unordered or (names and not self.plots)
        if not wanted or not 1 < len(made) <= MOST_DOTS:
            return
        if judge:
            sign = -1 if self.better == "max" else 1
            made = sorted(made, key=lambda g: sign * g.interval().mean)
        name, metric = ("at_best", judge) if judge else ("choices", self.metric)
        self._panels(name, rows, [], lambda _, path: plots.dots(made, path, metric, base=base))

    def _pareto(self, rows: Sequence[Row]) -> None:
        sizes = [row["trainable_params"] for row in rows if row.get("status") == "done" and row.get("trainable_params")]
        if sizes and max(sizes) > SAME_BUDGET * min(sizes):
            few = [n for n in axes.varying(rows) if n not in (RANK, OVER) and axes.count(rows, [n]) <= MOST_LINES]
            by = [METHOD] if METHOD in axes.varying(rows) else few[:1]
            paint = lambda part, path: pareto.pareto(part, path, self.metric, by=by, better=self.better)  # noqa: E731
            self._panels("pareto", rows, [], paint)

    def _curves(self, rows: Sequence[Row], base: Mapping[str, Any]) -> None:
        split, _, name = self.metric.partition(".")
        if split not in ("dev", "test"):
            return
        done = [row for row in rows if row.get("status") == "done"]
        done = [row for row in done if self._curve(row).exists()]
        if not done:
            self.notes.append("no finished arm has runs/<arm>/metrics.jsonl: there are no learning curves")
            return
        by, over = apart(done, axes.free(done))
        shown = ("dev", name) if self._evaluations(done[0]) > 1 else ("train", "loss")
        self._panels("learning_curves", done, over, lambda part, path: self._curves_of(part, path, by, shown, base))

    def _evaluations(self, row: Row) -> int:
        return sum(one["split"] == "dev" for one in records.read_jsonl(self._curve(row)))

    def _curves_of(
        self, rows: list[Row], path: Path, by: Sequence[str], shown: tuple[str, str], base: Mapping[str, Any]
    ) -> Plot:
        lines = axes.split(rows, by)
        caption = ""
        if len(lines) > MOST_LINES:
            kept = self._leading(lines, base)
            caption = f" The {len(kept)} with the best means, the baseline among them, of {len(lines)}."
            lines = kept
        label = lambda row: ", ".join(axes.text(row.get(name)) for name in by)  # noqa: E731
        runs = [(label(row), row.get("seed"), self._curve(row)) for _, part in lines for row in part]
        split, name = shown
        key = figure.key(by) if len(lines) > 1 else ""
        plot = plots.learning_curves(plots.read_curves(runs), path, name, split=split, key=key)
        return plot._replace(caption=plot.caption + caption)

    def _leading(self, lines: Sequence[tuple[str, list[Row]]], base: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
        sign = -1 if self.better == "max" else 1

        def place(line: tuple[str, list[Row]]) -> tuple[bool, float]:
            values = [row[self.metric] for row in line[1] if row.get(self.metric) is not None]
            own = all(results.encode(line[1][0].get(name)) == results.encode(v) for name, v in base.items())
            return not own, sign * sum(values) / len(values) if values else float("inf")

        return sorted(lines, key=place)[:MOST_LINES]

    def _curve(self, row: Row) -> Path:
        return self.workdir / "runs" / str(row["arm"]) / "metrics.jsonl"


def apart(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Shares axes between the lines of a figure and several figures, so that few enough lines are in each.

    Returns:
      The axes of the lines, and those of the figures: the ones with the fewest values.
    """
    by, over = list(names), []
    while len(by) > 1 and axes.count(rows, by) > MOST_LINES:
        fewest = min(by, key=lambda name: axes.count(rows, [name]))
        by.remove(fewest)
        over.append(fewest)
    return by, over
