"""Where records come from: a folder of split files, one file, or a data set of the Hugging Face hub.

A single file is cut into train, dev and test, and a hold-out is cut from train where there is no dev split, by rank
of a seeded hash of each record's content: exact sizes, no dependence on the order of the file, and equal records
always land in the same split, so that a repeated record never leaks from train into dev. A limit keeps the records of
smallest hash, in the order of the file, so a smaller limit is a subset of a larger one and sorted files lose no class.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.data import readers
from lora_jax.data.records import NAMES, Record, Splits, digest, rename
from lora_jax.errors import UserError, did_you_mean

# Names under which others keep our splits.
ALIASES = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "validation": "dev",
    "valid": "dev",
    "val": "dev",
    "test": "test",
}
SHARE = 10  # one record in ten to dev, and one to test where a single file has to give all three
_HUB_ID = re.compile(r"\w[\w.-]*(?:/[\w.-]+)?(?::[\w.-]+)?")
Rows = list[tuple[dict[str, Any], str]]


def load(
    path: str | Path,
    fields: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    need: Sequence[str] = ("train", "dev"),
) -> Splits:
    """Loads the splits of a data set.

    Args:
      path: a folder with `train`, `dev` (or `validation`, `valid`, `val`) and `test` files, suffix `.jsonl`, `.json`,
        `.csv`, `.tsv` or `.parquet`; one such file, which is split 80/10/10; or a hub id, `owner/name` or
        `owner/name:config`.
      fields: our name -> the data's name, for example `{"text": "sentence"}`.
      limit: at most this many records of each split.
      seed: of the splitting and of the choice under a limit. It belongs to the data, not to the run: keep it fixed
        over the seeds of an experiment, or their dev sets differ.
      need: splits that must be there. A missing dev is held out from train, a tenth of it, with a notice.

    Returns:
      The splits; `[]` for one that the data does not have.

    Raises:
      UserError: nothing there, a defect in a file (named with its line), a field that no record has.
    """
    _check_limit(limit)
    fields = {ours: theirs for ours, theirs in (fields or {}).items() if theirs is not None}
    rows, notices = _find(path, seed)
    if not rows.get("dev") and "dev" in need and rows.get("train"):
        rows["dev"], rows["train"] = _cut(rows["train"], 1, seed, f"the train split of {path}")
        notices.append(
            f"{path} has no dev split: held out {len(rows['dev'])} of its train records, {len(rows['train'])} remain"
        )
    for name in need:
        if not rows.get(name):
            raise UserError(f"{path} has no {name} split; it has: {', '.join(k for k in rows if rows[k])}")
    splits = {name: _limited(rows.get(name, []), limit, seed) for name in NAMES}
    named = {name: [rename(v, where, fields) for v, where in found] for name, found in splits.items()}
    _check_fields(fields, splits)
    return Splits(named, notices)


def _find(path: str | Path, seed: int) -> tuple[dict[str, Rows], list[str]]:
    local = Path(path).expanduser()
    if not str(path).strip():
        raise UserError("data.path is empty; give a folder with train.jsonl and dev.jsonl, a file, or a hub id")
    if local.is_dir():
        return _folder(local), []
    if local.is_file():
        return _single(local, seed)
    # `data/sst2` is written like a hub id; a first component that is a folder here says that a path was meant.
    looks_local = local.suffix.lower() in readers.READERS or (len(local.parts) > 1 and Path(local.parts[0]).exists())
    if looks_local or not _HUB_ID.fullmatch(str(path)):
        raise readers.missing(local)
    return _hub(str(path)), []


def _stem(path: Path) -> str | None:
    """The split that a file name stands for; `train-00000-of-00002.parquet` is a part of train."""
    return ALIASES.get(re.sub(r"-\d+-of-\d+$", "", path.stem).lower())


def _folder(folder: Path) -> dict[str, Rows]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in readers.READERS and p.is_file())
    found: dict[str, list[Path]] = {}
    for file in files:
        if split := _stem(file):
            found.setdefault(split, []).append(file)
    if not found:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:20]) or "nothing"
        raise UserError(
            f"the folder {folder} has no train, dev or test file ({', '.join(readers.READERS)}); it holds: {there}. "
            "Rename the files, or give the path of one file"
        )
    for split, parts in found.items():
        if len(parts) > 1 and not all(re.search(r"-\d+-of-\d+$", p.stem) for p in parts):
            raise UserError(f"{folder} has several {split} files: {', '.join(p.name for p in parts)}; keep one")
    return {split: [row for part in parts for row in readers.read(part)] for split, parts in found.items()}


def _single(file: Path, seed: int) -> tuple[dict[str, Rows], list[str]]:
    dev, test, train = _cut(readers.read(file), 2, seed, str(file))
    notice = (
        f"{file} is one file: split by a hash of each record into {len(train)} train, {len(dev)} dev, {len(test)} test"
    )
    return {"train": train, "dev": dev, "test": test}, [notice]


def _cut(rows: Rows, parts: int, seed: int, name: str) -> list[Rows]:
    """`parts` tenths of the rows and then the rest, by rank of the records' hashes; equal records stay together."""
    keys = [digest(values, seed) for values, _ in rows]
    distinct = sorted(set(keys))
    size = max(1, round(len(distinct) / SHARE))
    if len(distinct) <= parts * size:
        raise UserError(
            f"{name} holds {len(distinct)} distinct records, too few to cut {parts} more splits from; "
            "give a folder with train, dev and test files"
        )
    part = {key: min(rank // size, parts) for rank, key in enumerate(distinct)}
    return [[row for key, row in zip(keys, rows, strict=True) if part[key] == i] for i in range(parts + 1)]


def _limited(rows: Rows, limit: int | None, seed: int) -> Rows:
    if limit is None or len(rows) <= limit:
        return rows
    order = sorted(range(len(rows)), key=lambda i: (digest(rows[i][0], seed), i))
    return [rows[i] for i in sorted(order[:limit])]


def _hub(name: str) -> dict[str, Rows]:
    import datasets

    path, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(path, config or None)
    except Exception as error:  # the hub, its cache and its parsers each raise their own
        first = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{name!r} is no path, and could not be loaded from the hub. As a path: {readers.missing(Path(path))}. "
            f"From the hub: {type(error).__name__}: {first}"
        ) from None
    out: dict[str, Rows] = {}
    for split, table in found.items():
        if our := ALIASES.get(str(split).lower()):
            out[our] = [(_named(row, table.features), f"{name} {split} row {i}") for i, row in enumerate(table, 1)]
    if not out:
        raise UserError(f"{name!r} has no train, dev or test split; it has: {', '.join(map(str, found))}")
    return out


def _named(row: dict[str, Any], features: Any) -> dict[str, Any]:
    """Class numbers become class names; the hub writes -1 for a hidden label."""
    out = dict(row)
    for key, feature in features.items():
        if hasattr(feature, "int2str") and isinstance(row[key], int):
            out[key] = feature.int2str(row[key]) if row[key] >= 0 else None
    return out


def _check_limit(limit: Any) -> None:
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"data.limit must be a whole number of records per split, at least 1, or none; got {limit!r}")


def _check_fields(fields: Mapping[str, str], splits: Mapping[str, Rows]) -> None:
    """A mapping to a field that no record of any split has is a mistake; one that only some splits have is not."""
    for ours, theirs in fields.items():
        if not isinstance(theirs, str):
            raise UserError(f"data.fields.{ours} must be the name of a field, got {theirs!r}")
        if any(theirs in values for rows in splits.values() for values, _ in rows):
            continue
        values, where = next((row for rows in splits.values() for row in rows), ({}, "the data"))
        raise UserError(f"data.fields.{ours}={theirs!r}, but {where} has no such field; {did_you_mean(theirs, values)}")


__all__ = ["Record", "Splits", "load"]
