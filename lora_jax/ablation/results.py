"""`results.csv`: one row per arm, always whole on disk, and read back as it was written.

A row is a flat dictionary: `arm`, `status` ('done', or why there are no numbers: 'failed', ...), `reason`, one entry
per axis under its dotted name, `trainable_params`, metrics as `dev.accuracy`, then costs. Any other column is kept. A
CSV file has no types, so a value is written such that reading tells its type: numbers by `repr` (every bit of a float),
None as an empty field, lists as JSON, and a text that would read as something else ("4", "nan") as a JSON string.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import records
from lora_jax.errors import UserError

Row = dict[str, Any]

TEXT = (
    "arm",
    "label",
    "status",
    "reason",
)  # text as it stands, never a number: an arm's id may be 12345678 or 1e567890
FIRST = ("arm", "label", "status", "reason")
SIZE = ("trainable_params",)
COST = ("seconds", "tokens_per_second", "peak_memory_mb")
METRICS = ("dev.", "test.")

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|-?inf")
_WORDS = {"true": True, "True": True, "false": False, "False": False}


def is_axis(column: str) -> bool:
    """Whether a column names a field of the configuration: `seed`, or a dotted name that is no metric."""
    return column == "seed" or ("." in column and not column.startswith(METRICS))


def columns(rows: Iterable[Mapping[str, Any]], axes: Sequence[str] | None = None) -> list[str]:
    """The order of the columns: who, axes, size, metrics, costs, the rest.

    Metrics and unknown columns come in alphabetical order, so that the order does not depend on which arm ended first.

    Args:
      rows: of all arms.
      axes: the axes' columns in their order; by default every dotted name but metrics, as in the rows, then `seed`.

    Returns:
      Every column that a row has, and those of `axes`, once each.
    """
    found = list(dict.fromkeys(name for row in rows for name in row))
    if axes is None:
        axes = sorted((name for name in found if is_axis(name)), key=lambda name: name == "seed")
    fixed = {*FIRST, *SIZE, *COST, *axes}
    metrics = sorted(name for name in found if name.startswith(METRICS) and name not in fixed)
    rest = sorted(name for name in found if name not in fixed and name not in metrics)
    order = [n for n in FIRST if n in found], axes, [n for n in SIZE if n in found], metrics
    return [*dict.fromkeys([name for part in order for name in part])] + [n for n in COST if n in found] + rest


def encode(value: Any) -> str:
    """One field. Arrays of numpy become lists, tuples too."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        same = decode(value)
        return value if isinstance(same, str) and same == value else json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False)
    raise TypeError(f"a result is a number, a text, a list or None, got {type(value).__name__}: {value!r}")


def decode(text: str) -> Any:
    """The value that `encode` wrote; a text that is nothing else stays a text."""
    if text == "":
        return None
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text[0] in '[{"':
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text


def to_csv(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Rows as CSV text with a header."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_text(row.get(n)) if n in TEXT else encode(row.get(n)) for n in names])
    return out.getvalue()


def _text(value: Any) -> str:
    """A text as it stands. Half of a surrogate pair, which a traceback may hold, has no place in UTF-8."""
    return "" if value is None else str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def write_results(path: str | Path, rows: Sequence[Mapping[str, Any]], axes: Sequence[str] | None = None) -> None:
    """Writes all rows, or leaves the file as it was: a reader and a kill at any moment find a whole file.

    Args:
      path: of the file.
      rows: one dictionary per arm.
      axes: the axes' columns in their order (see `columns`).

    Raises:
      ValueError: two rows of one arm, or a row without one.
    """
    arms = [row.get("arm") for row in rows]
    if len(set(arms)) < len(arms) or None in arms:
        raise ValueError(f"every row needs an arm of its own, got {arms}")
    records.write_atomic(path, to_csv(rows, columns(rows, axes) or ["arm"]))


def read_results(path: str | Path) -> list[Row]:
    """Reads what `write_results` wrote, columns that it does not know included; no file is no rows.

    Raises:
      UserError: the file is not such a table.
    """
    path = Path(path)
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        names = next(reader, [])
        rows = [_row(path, reader.line_num, names, fields) for fields in reader]
    if "arm" not in names or len(set(names)) < len(names):
        raise UserError(f"{path}: the header must name every column once and have the column 'arm', got {names}")
    arms = [row["arm"] for row in rows]
    for arm in arms:
        if arm is None or arms.count(arm) > 1:
            raise UserError(f"{path}: the arm {arm!r} has {arms.count(arm)} rows; every row needs an arm of its own")
    return rows


def _row(path: Path, line: int, names: Sequence[str], fields: Sequence[str]) -> Row:
    if len(fields) != len(names):
        raise UserError(f"{path} line {line}: {len(fields)} fields, the header has {len(names)}; restore the line")
    return {n: (field or None) if n in TEXT else decode(field) for n, field in zip(names, fields)}


def replaced(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with the arm of `row` replaced in its place, or `row` at the end."""
    if all(old["arm"] != row["arm"] for old in rows):
        return [*rows, row]
    return [row if old["arm"] == row["arm"] else old for old in rows]
