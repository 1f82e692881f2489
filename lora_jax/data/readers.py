"""One file -> its records, with the line of each; every defect is named by file and line.

Known by suffix: `.jsonl` (one object a line), `.json` (a list of objects, or lines), `.csv`, `.tsv`, `.parquet`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError, did_you_mean

Rows = Iterator[tuple[dict[str, Any], str]]


def read(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Reads a file of records.

    Args:
      path: a file that exists.

    Returns:
      (fields, where) of every record, in the file's order.

    Raises:
      UserError: unknown suffix, not UTF-8, a broken line, a record that is not an object, no record at all.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"cannot read {path}: the suffix {path.suffix!r} is none of {', '.join(READERS)}")
    try:
        rows = list(reader(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{path} holds no record: the split is empty; give it at least one, or remove the file")
    return rows


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); convert the file, for example by "
            f"iconv -f latin1 -t utf-8"
        ) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(
            f'{where} is not an object but {kind}: {repr(value)[:60]}; a record looks like {{"text": "..."}}'
        )
    return value


def _parse(text: str, where: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if "line" in where else f" line {first_line + error.lineno - 1}"
        raise UserError(
            f"{where}{line} is not valid JSON: {error.msg} at column {error.colno}: {text[:60]!r}"
        ) from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be read") from None


def _lines(text: str, path: Path) -> Rows:
    # Not str.splitlines: it also breaks at U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            yield _object(_parse(line.rstrip("\r"), where), where), where


def _jsonl(path: Path) -> Rows:
    yield from _lines(_decode(path), path)


def _json(path: Path) -> Rows:
    text = _decode(path)
    if not text.lstrip().startswith("["):
        yield from _lines(text, path)
        return
    for number, value in enumerate(_parse(text, str(path)), 1):
        yield _object(value, f"{path} record {number}"), f"{path} record {number}"


def _table(delimiter: str) -> Callable[[Path], Rows]:
    def rows(path: Path) -> Rows:
        csv.field_size_limit(2**31 - 1)  # the default refuses a text of 128 KiB
        reader = csv.reader(io.StringIO(_decode(path), newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        try:
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if not header:
                    header = _header(row, where)
                elif row:
                    yield _row(header, row, where), where
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num} is not valid CSV: {error}") from None

    return rows


def _header(row: list[str], where: str) -> list[str]:
    twice = sorted({name for name in row if row.count(name) > 1})
    if twice:
        raise UserError(
            f"{where}: the column {twice[0]!r} stands twice in the header; the first line must name the columns"
        )
    return row


def _row(header: list[str], row: list[str], where: str) -> dict[str, Any]:
    if len(row) != len(header):
        raise UserError(f"{where} has {len(row)} columns, but the header has {len(header)}: {', '.join(header)}")
    return dict(zip(header, row, strict=True))


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a valid parquet file: {str(error).splitlines()[0]}") from None
    for number, values in enumerate(table.to_pylist(), 1):
        yield values, f"{path} row {number}"


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}


def missing(path: Path) -> UserError:
    """The error for a path that does not exist: the nearest names in the deepest folder that does."""
    folder = path.parent
    while not folder.exists():
        path, folder = folder, folder.parent
    if not folder.is_dir():
        return UserError(f"{folder} is a file, so there is no {path}")
    there = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    return UserError(f"there is no {path.name!r} in the folder {folder.absolute()}; {did_you_mean(path.name, there)}")
