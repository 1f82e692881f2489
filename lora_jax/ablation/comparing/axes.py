"""The axes of a grid as its rows show them: which vary, which follow from another one, and how a value is written."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lora_jax.ablation import results
from lora_jax.ablation.results import Row


def varying(rows: Sequence[Row]) -> list[str]:
    """The axes, but the seed, in which the rows differ."""
    names = [name for name in results.columns(rows) if results.is_axis(name) and name != "seed"]
    return [name for name in names if len(_distinct(rows, [name])) > 1]


def free(rows: Sequence[Row]) -> list[str]:
    """The varying axes without those that another one settles (the rank that a budget leaves each choice of matrices).

    What is left tells all groups apart. Of two that settle each other the first stays.
    """
    kept = varying(rows)
    for name in reversed(kept.copy()):
        if any(len(_distinct(rows, [other])) == len(_distinct(rows, [other, name])) for other in kept if other != name):
            kept.remove(name)
    return kept


def positive(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows whose value on an axis has a place on a logarithmic axis."""
    values = [row.get(name) for row in rows]
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in values]
    return [row for row, number in zip(rows, numbers) if number]


def split(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[str, list[Row]]]:
    """The rows in parts, one per combination of values of `names`, with a description: 'layers = all'."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(results.encode(row.get(name)) for name in names), []).append(row)
    describe = lambda row: ", ".join(f"{title(name)} = {text(row.get(name))}" for name in names)  # noqa: E731
    return [(describe(part[0]), part) for part in parts.values()]


def count(rows: Sequence[Row], names: Sequence[str]) -> int:
    """How many combinations of values of `names` the rows have."""
    return len(_distinct(rows, names))


def _distinct(rows: Sequence[Row], names: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(results.encode(row.get(name)) for name in names) for row in rows}


def text(value: Any) -> str:
    """A value of an axis as a reader wants it: lists without brackets, None as 'default'."""
    if value is None:
        return "default"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return "+".join(text(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def values(column: Iterable[Any]) -> list[str]:
    """The values of a column once each: numbers by size, anything else as it comes."""
    found = list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in column))
    ordered = sorted(found) if all(isinstance(v, (int, float)) for v in found) else found
    return [text(v) for v in ordered]


def title(column: str) -> str:
    """'adapter.learning_rate' -> 'learning rate'."""
    return column.rsplit(".", 1)[-1].replace("_", " ")
