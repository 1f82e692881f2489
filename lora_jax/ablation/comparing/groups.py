"""Rows of arms -> groups that differ in more than the seed -> comparisons -> `groups.csv`.

Only arms with the status 'done' and a finite metric count. The others are named in `left_out`, and a verdict says how
many they were: an arm that diverged is a finding about its configuration, not about the mean of those that did not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax import records
from lora_jax.ablation import results
from lora_jax.ablation.comparing import statistics, verdicts
from lora_jax.ablation.comparing.statistics import LEVEL
from lora_jax.ablation.results import Row
from lora_jax.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Group:
    """Arms that differ in the seed only: their axes, the metric by seed, and the arms that have none."""

    label: str
    axes: dict[str, Any]
    values: dict[Any, float]
    left_out: tuple[str, ...] = ()
    trainable_params: Any = None

    def interval(self, level: float = LEVEL) -> statistics.Interval:
        """Mean and interval over seeds."""
        return statistics.interval(list(self.values.values()), level)


class Comparison(NamedTuple):
    """Two groups over their shared seeds: `p` is after Holm's method over the `comparisons` of the family."""

    first: Group
    second: Group
    paired: statistics.Paired
    p: float | None
    comparisons: int
    needed: int | None
    verdict: str


def grouped(rows: Sequence[Row], metric: str, axes: Sequence[str] | None = None) -> list[Group]:
    """Groups of arms, in the order of their first arm.

    Args:
      rows: of `read_results`.
      metric: a column, as 'dev.accuracy'.
      axes: the columns that make a group; by default every axis but `seed` (see `results.is_axis`).

    Raises:
      UserError: no arm has this metric, or two arms of one group have one seed.
    """
    known = sorted({n for row in rows for n in row if n.startswith(results.METRICS) or n in results.COST})
    if not any(metric in row for row in rows):
        raise UserError(f"no arm has the metric {metric!r}; {did_you_mean(metric, known)}")
    if axes is None:
        axes = [name for name in results.columns(rows) if results.is_axis(name) and name != "seed"]
    parts: dict[tuple, list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(results.encode(row.get(name)) for name in axes), []).append(row)
    varying = [name for i, name in enumerate(axes) if len({key[i] for key in parts}) > 1]
    return [_group(part, metric, axes, varying) for part in parts.values()]


def _group(rows: Sequence[Row], metric: str, axes: Sequence[str], varying: Sequence[str]) -> Group:
    short = [name.rsplit(".", 1)[-1] for name in varying]
    names = [long if short.count(s) > 1 else s for long, s in zip(varying, short)]
    label = ", ".join(f"{n}={results.encode(rows[0].get(axis))}" for n, axis in zip(names, varying)) or "all arms"
    values: dict[Any, float] = {}
    arms: dict[Any, str] = {}
    left_out = []
    for row in rows:
        seed = row.get("seed")
        if seed in arms:
            raise UserError(
                f"the arms {arms[seed]} and {row['arm']} ({label}) both have the seed {seed}: the axis that tells them "
                "apart must be a column"
            )
        arms[seed] = row["arm"]
        if counts(row, metric):
            values[seed] = float(row[metric])
        else:
            left_out.append(f"{row['arm']} (seed {seed}): {_why(row, metric)}")
    sizes = {row.get("trainable_params") for row in rows} - {None}
    return Group(label, {n: rows[0].get(n) for n in axes}, values, tuple(left_out), *(sizes if len(sizes) == 1 else ()))


def counts(row: Row, metric: str) -> bool:
    """Whether an arm is done and has a finite number there."""
    value = row.get(metric)
    return row.get("status") == "done" and isinstance(value, (int, float)) and math.isfinite(value)


def _why(row: Row, metric: str) -> str:
    if row.get("status") == "done":
        return f"{metric} is {row.get(metric)}"
    return ", ".join(str(row[name]) for name in ("status", "reason") if row.get(name)) or "no status"


def find(groups: Sequence[Group], wanted: str | Mapping[str, Any]) -> Group:
    """The one group with this label, or with these values of axes (`{"adapter.rank": 8}`).

    Raises:
      UserError: none, or several.
    """
    if isinstance(wanted, str):
        hits = [g for g in groups if g.label == wanted]
    else:
        same = [{n: results.encode(g.axes.get(n)) for n in wanted} for g in groups]
        hits = [g for g, own in zip(groups, same) if own == {n: results.encode(v) for n, v in wanted.items()}]
    if len(hits) == 1:
        return hits[0]
    tail = did_you_mean(str(wanted), [g.label for g in groups]) if not hits else ", ".join(g.label for g in hits)
    raise UserError(f"{len(hits) or 'no'} groups are {wanted!r}, one was expected; {tail}")


def compare(
    pairs: Sequence[tuple[Group, Group]], metric: str, better: str | None = None, level: float = LEVEL
) -> list[Comparison]:
    """Compares pairs of groups over shared seeds. All pairs of one call are one family for Holm's method.

    Args:
      pairs: (first, second); differences are first - second.
      metric: what the values are; its name says whether more is better.
      better: 'max' or 'min' where the name does not say.
      level: of significance in the whole family.
    """
    better = verdicts.better_is(metric, better)
    tests = []
    for first, second in pairs:
        shared = [seed for seed in first.values if seed in second.values]
        tests.append(
            statistics.paired([first.values[s] for s in shared], [second.values[s] for s in shared], level=level)
        )
    adjusted = statistics.holm([test.p for test in tests])
    count = sum(test.p is not None for test in tests)
    return [_comparison(*pair, test, p, count, better, level) for pair, test, p in zip(pairs, tests, adjusted)]


def _comparison(first, second, test: statistics.Paired, p, count: int, better: str, level: float) -> Comparison:
    needed = None
    if test.sd:
        needed = statistics.seeds_needed(test.difference, test.sd, level / count)
    text = verdicts.difference(test, p=p, comparisons=count, needed=needed, better=better, level=level)
    missing = len(first.left_out) + len(second.left_out)
    unpaired = len(set(first.values) ^ set(second.values))
    notes = [f"{missing} failed or not finite"] * bool(missing) + [f"{unpaired} without a partner"] * bool(unpaired)
    text += f"; arms left out: {', '.join(notes)}" if notes else ""
    return Comparison(first, second, test, p, count, needed, text)


def table(
    rows: Sequence[Row],
    metrics: Sequence[str],
    baseline: str | Mapping[str, Any] | None = None,
    axes: Sequence[str] | None = None,
    better: Mapping[str, str] | None = None,
    level: float = LEVEL,
) -> list[Row]:
    """One row per metric and group: mean, interval, difference to the baseline, verdict.

    Args:
      rows: of `read_results`.
      metrics: columns; each is a family of its own for Holm's method.
      baseline: label or axes of the group that the others are compared with; also the one whose seeds give the noise
        floor. None compares nothing.
      axes: see `grouped`.
      better: 'max' or 'min' of metrics whose name does not say.
      level: of significance.
    """
    out = []
    for metric in metrics:
        groups = grouped(rows, metric, axes)
        base = None if baseline is None else find(groups, baseline)
        pairs = [] if base is None else [(g, base) for g in groups if g is not base]
        compared = compare(pairs, metric, (better or {}).get(metric), level) if pairs else []
        by_label = {c.first.label: c for c in compared}
        out += [{**_row(g, metric, level), **_against(g, base, by_label.get(g.label), level)} for g in groups]
    return out


def _row(group: Group, metric: str, level: float) -> Row:
    over = group.interval(level)
    low, high = (None, None) if over.half is None else (over.mean - over.half, over.mean + over.half)
    return {
        **{"group": group.label, **group.axes, "trainable_params": group.trainable_params, "metric": metric},
        **{"n": over.n, "seeds": list(group.values), "mean": over.mean if over.n else None, "sd": over.sd},
        **{"low": low, "high": high, "left_out": list(group.left_out)},
    }


def _against(group: Group, base: Group | None, compared: Comparison | None, level: float) -> Row:
    row: Row = dict.fromkeys(
        ("baseline", "difference", "difference_low", "difference_high", "shared_seeds", "p", "p_holm")
    )
    row |= {"seeds_needed": None, "noise_floor": None, "verdict": verdicts.mean(group.interval(level))}
    if group is base:
        count = max(1, len(group.values))
        floor = statistics.noise_floor(list(group.values.values()), count, level)
        row |= {"noise_floor": floor.difference, "verdict": f"the baseline; {verdicts.noise(floor, count, level)}"}
    if compared is not None:
        test = compared.paired
        row |= {"baseline": compared.second.label, "shared_seeds": test.n, "p": test.p, "p_holm": compared.p}
        row |= {"difference": test.difference if test.n else None}
        if test.half is not None:
            row |= {"difference_low": test.difference - test.half, "difference_high": test.difference + test.half}
        row |= {"seeds_needed": compared.needed, "verdict": compared.verdict}
    return row


def write_groups(path: str | Path, rows: Sequence[Row], metrics: Sequence[str], **options: Any) -> list[Row]:
    """Writes `groups.csv`, whole or not at all; `options` are those of `table`, which it returns."""
    out = table(rows, metrics, **options)
    records.write_atomic(
        path, results.to_csv(out, list(dict.fromkeys(name for row in out for name in row)) or ["group"])
    )
    return out
