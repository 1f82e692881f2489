"""Measurements as a CSV, and what they say of a row's claims as one table for the terminal and for markdown."""

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.row import Claim, Row, unit
from lora_jax.errors import UserError

HEAD = ("row", "what", "side", "value", "other", "its value", "ratio", "range", "target", "reached", "n")
BEGIN, END = "<!-- {}: written by experiments.benchmark -->", "<!-- {}: end -->"


class Measurement(NamedTuple):
    """One number. `repeat` 0 is a run that warmed up and does not count."""

    row: str
    side: str
    repeat: int
    name: str
    value: float
    unit: str
    settings: str
    versions: str
    date: str


def measurements(
    row: str, side: str, repeat: int, values: Mapping[str, float], settings: Any, versions: Any, date: str
) -> list[Measurement]:
    """A finished process's numbers."""
    told = [json.dumps(x, sort_keys=True) for x in (settings, versions)]
    return [Measurement(row, side, repeat, name, float(v), unit(name), *told, date) for name, v in values.items()]


def write(path: Path, found: Sequence[Measurement]) -> None:
    """Writes the CSV; whole at any kill."""
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(Measurement._fields)
        out.writerows(found)
    part.replace(path)


def read(path: Path) -> list[Measurement]:
    """Reads what `write` wrote; nothing where there is no file.

    Raises:
      UserError: another file has the name.
    """
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != Measurement._fields:
        raise UserError(
            f"{path} is not a CSV of this benchmark: its columns differ; move it away or name another --out"
        )
    return [Measurement(a, b, int(c), d, float(e), *rest) for a, b, c, d, e, *rest in lines[1:]]


def table(rows: Mapping[str, Row], found: Sequence[Measurement], judge: bool) -> list[tuple[str, ...]]:
    """The claims of every row that has measurements, as lines of text below `HEAD`.

    Args:
      rows: by name.
      found: of all of them.
      judge: whether targets are held against the numbers; not at toy sizes.
    """
    by: dict[tuple[str, str, str], dict[int, float]] = {}
    for one in found:
        if one.repeat:
            by.setdefault((one.row, one.side, one.name), {})[one.repeat] = one.value
    measured = {one.row for one in found}
    lines = [HEAD]
    for name, row in rows.items():
        if name in measured:
            lines += [_line(name, claim, by, judge) for claim in row.claims]
    return lines


def ratios(claim: Claim, own: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float, float]:
    """(ratio of the medians, smallest and largest ratio of two runs of one repeat), the way that the claim asks for."""
    turn = (lambda a, b: _over(b, a)) if claim.better == "lower" else _over
    pairs = [turn(own[i], other[i]) for i in sorted(own.keys() & other.keys())]
    whole = turn(statistics.median(own.values()), statistics.median(other.values()))
    return whole, min(pairs, default=math.nan), max(pairs, default=math.nan)


def text(lines: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown(lines: Sequence[Sequence[str]], said: Sequence[str]) -> str:
    """The table and what is said about it, as markdown."""
    head, *rest = ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
    rule = "|" + "---|" * len(HEAD)
    return "\n".join([head, rule, *rest, "", *(f"* {line}" for line in said)]) + "\n"


def fill(page: Path, suite: str, content: str) -> None:
    """Puts a table between its two markers on a page.

    Raises:
      UserError: no such page, or it has no such markers.
    """
    begin, end = BEGIN.format(suite), END.format(suite)
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, first, rest = old.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise UserError(
            f"--docs={page}: expected a page with the lines {begin!r} and {end!r}, between which the table goes"
        )
    page.write_text(f"{before}{begin}\n\n{content}\n{end}{after}", encoding="utf-8")


def _line(
    name: str, claim: Claim, by: Mapping[tuple[str, str, str], Mapping[int, float]], judge: bool
) -> tuple[str, ...]:
    own = by.get((name, claim.side, claim.value), {})
    other = by.get((name, claim.other, claim.value), {}) if claim.other else {}
    shown = [_median(own, claim.value), _median(other, claim.value) if claim.other else ""]
    ratio, spread, held = "", "", _middle(own)
    if claim.other:
        held = math.nan
        if own and other:
            held, low, high = ratios(claim, own, other)
            ratio, spread = f"{held:.3g}", f"{low:.3g} to {high:.3g}"
    elif own:
        spread = f"{min(own.values()):.3g} to {max(own.values()):.3g}"
    target = "{} {:g}".format(*claim.target) if claim.target else ""
    count = f"{len(own)}/{len(other)}" if claim.other else str(len(own))
    return (
        name, claim.what, claim.side, shown[0], claim.other or "", shown[1], ratio, spread, target,
        _reached(held, claim.target) if judge else "", count,
    )  # fmt: skip


def _reached(value: float, target: tuple[str, float] | None) -> str:
    if target is None or math.isnan(value):
        return ""
    return "yes" if (value >= target[1] if target[0] == ">=" else value <= target[1]) else "no"


def _median(values: Mapping[int, float], name: str) -> str:
    if not values:
        return "not measured"
    word = unit(name)
    return f"{_middle(values):.4g}" + (f" {word}" if word != "1" else "")


def _middle(values: Mapping[int, float]) -> float:
    return statistics.median(values.values()) if values else math.nan


def _over(a: float, b: float) -> float:
    return a / b if b else math.nan
