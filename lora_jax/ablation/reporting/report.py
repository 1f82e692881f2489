"""The report of a grid: groups.csv, effects.csv, figures, report.html (one file, self-contained), report.md.

Read from the work directory: results.csv, grid.json (`grid_file` has its keys), `runs/<arm>/metrics.jsonl`. It can be
written at any time, of an unfinished grid too, and says then what is missing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax import records
from lora_jax.ablation import grid_file, results
from lora_jax.ablation.comparing import axes as axes_of
from lora_jax.ablation.comparing import effects, groups, search, verdicts
from lora_jax.ablation.comparing.groups import Comparison, Group
from lora_jax.ablation.comparing.search import OVER, Best
from lora_jax.ablation.comparing.statistics import LEVEL
from lora_jax.ablation.grid_file import GridFile
from lora_jax.ablation.reporting import by_example, pages
from lora_jax.ablation.reporting.findings import Told
from lora_jax.ablation.reporting.gallery import Gallery
from lora_jax.ablation.results import Row
from lora_jax.errors import UserError, did_you_mean

PLOTS = "plots"
MISSING = "missing"
USUAL = ("dev.accuracy", "dev.macro_f1", "dev.exact_match", "dev.bleu", "dev.loss", "test.accuracy", "test.loss")

Baseline = str | Mapping[str, Any]


class Judged(NamedTuple):
    """The groups that the report is about, and what they were compared with.

    `base` is among `made`; `whole` is the same group among all groups of the grid, where the learning rate is an axis;
    `rows` are those that `made` is made of.
    """

    metric: str
    made: list[Group]
    base: Group | None
    whole: Group | None
    compared: list[Comparison]
    found: list[Best]
    effects: list[Comparison]
    rows: Sequence[Row] = ()


def write(
    workdir: str | Path, *, metric: str | None = None, baseline: Baseline | None = None, level: float = LEVEL
) -> list[Path]:
    """Writes groups.csv, effects.csv, `plots/*.png` and `.csv`, report.html and report.md into a grid's work directory.

    Args:
      workdir: of the grid.
      metric: the column that answers the question; by default what grid.json says, else the first usual one.
      baseline: the group that the others are compared with, by label or values of axes (`{"adapter.rank": 8}`); by
        default the config file's own values (`base` of grid.json) if the grid has them, else the grid's first group.
      level: of significance, 1 - confidence of the intervals.

    Returns:
      The files, report.html first.

    Raises:
      UserError: no arm yet, an unknown metric or baseline, a metric that does not say whether more is better.
    """
    folder = Path(workdir)
    described = grid_file.read(folder)
    every = _rows(folder, described)
    # The others have not run yet: that is no failure, and tells nothing.
    rows = [row for row in every if row.get("status") != MISSING]
    metric = _metric(rows, described, metric)
    named = {*(arm.get("id") for arm in described.arms), *(row["arm"] for row in every)}
    better = verdicts.better_is(metric, described.better if metric == described.metric else None)
    numbers = any(groups.counts(row, metric) for row in rows)
    judged = _judge(rows, metric, better, baseline, described, level) if numbers else None
    gallery = Gallery(folder, folder / PLOTS, metric, better)
    told = _told(folder, rows, len(named) - len(rows), metric, better, judged, described)
    if judged is not None:
        _clear(folder / PLOTS)
        gallery.fill(rows, judged.made, judged.base, judged.found, judged.metric)
    written = _groups_csv(folder, rows, metric, better, judged, level)
    by_axis = effects.table(told.effects)
    records.write_atomic(folder / "effects.csv", results.to_csv(by_axis, list(by_axis[0]) if by_axis else ["axis"]))
    page = pages.Page(described, folder.absolute().name, told, rows, gallery, written, by_axis, level)
    out = [folder / name for name in ("report.html", "report.md", "groups.csv", "effects.csv")]
    records.write_atomic(out[0], pages.html(page))
    records.write_atomic(out[1], pages.markdown(page))
    return out + [path for plot in gallery.plots for path in (plot.png, plot.csv)]


def _rows(folder: Path, described: GridFile) -> list[Row]:
    """The arms. A dotted column that grid.json does not name as an axis tells nothing apart."""
    rows = results.read_results(folder / "results.csv")
    if not rows:
        raise UserError(
            f"{folder} has no results.csv with an arm in it: run experiments.ablate there first (a report can be "
            "written as soon as one arm is done)"
        )
    other = {n for row in rows for n in row if described.axes and results.is_axis(n) and n not in described.axes}
    other -= {"seed"}
    return [{name: value for name, value in row.items() if name not in other} for row in rows]


def _metric(rows: Sequence[Row], described: GridFile, given: str | None) -> str:
    known = sorted({n for row in rows for n in row if n.startswith(results.METRICS) or n in results.COST})
    wanted = given or described.metric or next((name for name in USUAL if name in known), None)
    if wanted is None:
        raise UserError(f"which metric answers the question? Say metric='...'; {did_you_mean('dev.accuracy', known)}")
    # Before the first arm is done no row has any metric, and the report tells of failures only.
    if known and wanted not in known:
        raise UserError(f"no arm has the metric {wanted!r}; {did_you_mean(wanted, known)}")
    return wanted


def _judge(
    rows: Sequence[Row], metric: str, better: str, given: Baseline | None, described: GridFile, level: float
) -> Judged:
    """Groups against their baseline; where the learning rate was searched, each choice at its best."""
    made = groups.grouped(rows, metric)
    names = axes_of.free(rows)
    if OVER not in names or len(names) < 2:
        base = _baseline(made, given, described.base)
        by_axis = effects.compare(rows, metric, base.axes, better, level)
        return Judged(metric, made, base, base, _compare(made, base, metric, better, level), [], by_axis, rows)
    found = search.search(rows, metric, better)
    choice = _baseline([one.group for one in found], _without_rate(given), _without_rate(described.base))
    value = next(one.value for one in found if one.group is choice)
    whole = groups.find(made, {**choice.axes, OVER: value})
    judge = search.test_metric(rows, metric) or metric
    kept = search.at_best(rows, found)
    at_best = groups.grouped(kept, judge, list(choice.axes))
    base = groups.find(at_best, choice.axes)
    return Judged(judge, at_best, base, whole, _compare(at_best, base, judge, better, level), found, [], kept)


def _baseline(made: Sequence[Group], given: Baseline | None, own: Mapping[str, Any] | None) -> Group:
    if given:
        return groups.find(made, given)
    if made and own:
        asked = {name: value for name, value in own.items() if name in made[0].axes}
        same = [g for g in made if {n: results.encode(g.axes[n]) for n in asked} == _encoded(asked)]
        if asked and len(same) == 1:
            return same[0]
    return next((g for g in made if g.values), made[0])


def _encoded(axes: Mapping[str, Any]) -> dict[str, str]:
    return {name: results.encode(value) for name, value in axes.items()}


def _without_rate(given: Any) -> Any:
    return {n: v for n, v in given.items() if n != OVER} if isinstance(given, Mapping) else given


def _compare(made: Sequence[Group], base: Group, metric: str, better: str, level: float) -> list[Comparison]:
    return groups.compare([(g, base) for g in made if g is not base], metric, better, level)


def _told(
    folder: Path,
    rows: Sequence[Row],
    missing: int,
    metric: str,
    better: str,
    judged: Judged | None,
    described: GridFile,
) -> Told:
    failed = sum(not groups.counts(row, metric) for row in rows)
    shown = judged.metric if judged else metric
    split = shown.partition(".")[0]
    return Told(
        metric=shown,
        better=better,
        made=judged.made if judged else [],
        base=judged.base if judged else None,
        compared=judged.compared if judged else [],
        found=judged.found if judged else [],
        chosen_by=metric,
        optimism=search.optimism(judged.found, rows, metric) if judged and judged.found else None,
        examples=described.examples.get(split) or _examples(folder, rows, split),
        axes=axes_of.varying(rows),
        effects=judged.effects if judged else [],
        failed=failed,
        missing=missing,
        by_example=by_example.compare(folder, judged.rows, judged.made, shown, better) if judged else None,
    )


def _examples(folder: Path, rows: Sequence[Row], split: str) -> int | None:
    """How many examples a split has, by the predictions of the first arm that wrote some."""
    for row in rows:
        path = folder / "runs" / str(row["arm"]) / "predictions" / f"{split}.jsonl"
        if row.get("status") == "done" and path.exists():
            return len(records.read_jsonl(path)) or None
    return None


def _groups_csv(
    folder: Path, rows: Sequence[Row], metric: str, better: str, judged: Judged | None, level: float
) -> list[Row]:
    """Every metric of the grid; compared with the baseline where its name says what is better."""
    names = [n for n in results.columns(rows) if n.startswith(results.METRICS) or n in results.COST]
    names = [metric] * (metric in names) + [n for n in names if n != metric]
    out: list[Row] = []
    for name in [n for n in names if any(isinstance(row.get(n), (int, float)) for row in rows)]:
        wanted = judged.whole.axes if judged and judged.whole else None
        direction = better if name == metric else _direction(name)
        against = wanted if direction else None  # without a direction no difference is better or worse
        out += groups.table(rows, [name], against, better={name: direction} if direction else None, level=level)
    columns = list(dict.fromkeys(name for row in out for name in row)) or ["group"]
    records.write_atomic(folder / "groups.csv", results.to_csv(out, columns))
    return [row for row in out if row["metric"] == metric]


def _direction(name: str) -> str | None:
    try:
        return verdicts.better_is(name)
    except UserError:
        return None


def _clear(folder: Path) -> None:
    """Takes away the figures of an earlier report, which may be of other axes."""
    for path in [*folder.glob("*.png"), *folder.glob("*.csv")]:
        path.unlink()
