"""What a reader sees of a report: the tables, and the two pages (`report.html.j2`, `report.md.j2`)."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.ablation.comparing import axes, groups, verdicts
from lora_jax.ablation.comparing.search import OVER
from lora_jax.ablation.grid_file import GridFile
from lora_jax.ablation.reporting import figure, findings
from lora_jax.ablation.reporting.findings import Told
from lora_jax.ablation.reporting.gallery import Gallery
from lora_jax.ablation.results import Row

MOST_IN_MARKDOWN = 60


class Table(NamedTuple):
    """Cells as they are printed; `numeric` are the columns to align to the right, `bold` the rows that stand out."""

    head: list[str]
    rows: list[list[str]]
    numeric: set[int]
    bold: set[int]


class Page(NamedTuple):
    """What both pages are made of."""

    described: GridFile
    name: str
    told: Told
    rows: Sequence[Row]
    gallery: Gallery
    written: Sequence[Row]
    effects: Sequence[Row]
    level: float


def html(page: Page) -> str:
    """One file: figures as data URIs, their CSV too, no script."""
    return _render("report.html.j2", page)


def markdown(page: Page) -> str:
    """For a pull request: figures by their relative path."""
    return _render("report.md.j2", page)


def _render(template: str, page: Page) -> str:
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {"nice": nice, "uri": uri, "cell": lambda text: nice(text).replace("|", "\\|").replace("\n", " ")}
    told = page.told
    return env.get_template(template).render(
        about=page.described,
        name=page.name,
        facts=facts(page),
        metric=figure.measure(told.chosen_by)[0].partition(" (")[0],
        better="more" if told.better == "max" else "less",
        supports=findings.supports(told, page.level),
        limits=findings.limits(told, page.level),
        best=best_table(told) if told.found else None,
        effects=effect_table(page.effects),
        table=group_table(page.written, page.rows),
        most=MOST_IN_MARKDOWN,
        plots=page.gallery.plots,
        notes=page.gallery.notes,
        failed=failed_table(page.rows, told.chosen_by),
        level=page.level,
    )


def nice(text: Any) -> str:
    """'+-' as one sign."""
    return str(text).replace("+-", "\u00b1")


def uri(path: Path) -> str:
    """A file as a data URI."""
    kind = {".png": "image/png", ".csv": "text/csv;charset=utf-8"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def facts(page: Page) -> list[tuple[str, str]]:
    """What was run, where, how long."""
    about, rows, told = page.described, page.rows, page.told
    done = len(rows) - told.failed
    states = [f"{done} done"] + [f"{n} {word}" for n, word in ((told.failed, "failed"), (told.missing, "not run")) if n]
    out = [("arms", ", ".join(states))]
    compute = sum(row["seconds"] for row in rows if isinstance(row.get("seconds"), (int, float)))
    times = (("training time, summed over arms", compute), ("wall time of the grid", about.seconds or 0))
    out += [(what, duration(seconds)) for what, seconds in times if seconds]
    out += [(name, str(getattr(about, name))) for name in ("started", "device", "commit") if getattr(about, name)]
    out += [("versions", ", ".join(f"{k} {v}" for k, v in about.versions.items()))] * bool(about.versions)
    return out


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def group_table(written: Sequence[Row], rows: Sequence[Row]) -> Table:
    """Every group of the grid: the axes that vary, its size, mean, verdict."""
    names = axes.varying(rows)
    head = [*map(axes.title, names), "parameters", "seeds", "mean", "p (Holm)", "against the baseline"]
    out = [[*(axes.text(row[name]) for name in names), _size(row["trainable_params"]), str(row["n"]), _mean(row),
            _p(row["p_holm"]), _short(row["verdict"])] for row in written]  # fmt: skip
    bold = {i for i, row in enumerate(written) if str(row["verdict"]).startswith("the baseline")}
    return Table(head, out, {len(names) + i for i in range(4)}, bold)


def best_table(told: Told) -> Table:
    """Every choice at its best learning rate, the best choice first."""
    by_label = {g.label: (g, name) for g, name in zip(told.made, figure.names(told.made))}
    verdict = {c.first.label: c for c in told.compared}
    tested = told.metric != told.chosen_by
    head = ["choice", "parameters", axes.title(OVER), "tried", "seeds", f"{told.chosen_by} (chosen by)"]
    head += [told.metric] * tested + ["p (Holm)", "against the baseline"]
    sign = -1 if told.better == "max" else 1
    place = lambda one: sign * by_label[one.group.label][0].interval().mean  # noqa: E731
    out, bold = [], set()
    for i, one in enumerate(sorted(told.found, key=place)):
        (group, name), against = by_label[one.group.label], verdict.get(one.group.label)
        bold |= {i} if against is None else set()
        out.append([
            name, _size(group.trainable_params), axes.text(one.value) + f" ({one.edge})" * bool(one.edge),
            str(len(one.tried)), str(len(group.values)), _without_count(one.group.interval()),
            *[_without_count(group.interval())] * tested, _p(against.p if against else None),
            _short(against.verdict) if against else "the baseline",
        ])  # fmt: skip
    return Table(head, out, set(range(1, 7 + tested)), bold)


def effect_table(effects: Sequence[Row]) -> Table:
    """Each axis by itself."""
    head = ["axis", "value", "instead of", "averaged", "difference", "p (Holm)", "verdict"]
    out = [[axes.title(row["axis"]), axes.text(row["value"]), axes.text(row["baseline"]), row["averaged"],
            f"{verdicts.number(row['difference'], row['half'])}", _p(row["p_holm"]), _short(row["verdict"])]
           for row in effects]  # fmt: skip
    return Table(head, out, {4, 5}, set())


def failed_table(rows: Sequence[Row], metric: str) -> Table:
    """The arms without a result, and why."""
    bad = [row for row in rows if not groups.counts(row, metric)]
    names = axes.varying(rows)
    head = ["arm", *map(axes.title, names), "seed", "status", "reason"]
    out = [[str(row["arm"]), *(axes.text(row.get(name)) for name in names), str(row.get("seed", "")),
            str(row.get("status") or ""), str(row.get("reason") or f"{metric} is {row.get(metric)}")]
           for row in bad]  # fmt: skip
    return Table(head, out, set(), set())


def _short(verdict: str) -> str:
    """A verdict beside columns that say the rest."""
    if verdict.startswith("the baseline"):
        return "the baseline"
    return re.sub(r" after Holm over \d+ comparisons", "", verdict)


def _mean(row: Row) -> str:
    if not row["n"]:
        return "no result"
    half = None if row["high"] is None else row["high"] - row["mean"]
    return _without_count(verdicts.Interval(row["mean"], row["sd"], half, row["n"]))


def _without_count(over: verdicts.Interval) -> str:
    """A mean beside a column with the number of seeds."""
    return re.sub(r" \(.*\)| in all .*", "", verdicts.mean(over))


def _size(count: Any) -> str:
    return f"{count:,}" if isinstance(count, int) else ""


def _p(p: float | None) -> str:
    return "" if p is None else verdicts.p_value(p).removeprefix("p = ").removeprefix("p ")
