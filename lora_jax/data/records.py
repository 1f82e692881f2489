"""Record: one example of the data under our names, and where it came from; Splits: train, dev and test."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.errors import UserError, did_you_mean

NAMES = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One example.

    Attributes:
      values: the record's own fields, and the renamed ones under our names.
      where: file and line (or row) it came from, for messages.
      fields: our name -> the data's name, as given by `data.fields`.
    """

    values: Mapping[str, Any]
    where: str = "a record"
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def require(self, name: str) -> Any:
        """Returns the value of a field.

        Raises:
          UserError: the record has no such field, or it is null.
        """
        theirs = self.fields.get(name, name)
        if name not in self.values:
            own = [k for k in self.values if k not in self.fields]
            stands = f", which stands for {name!r}" if theirs != name else ""
            raise UserError(
                f"{self.where} has no field {theirs!r}{stands}; {did_you_mean(theirs, own)}. "
                f"Choose the field by data.fields.{name}=NAME"
            )
        if self.values[name] is None:
            raise UserError(f"{self.where}: the field {theirs!r} is null; give it a value or drop the record")
        return self.values[name]

    def text(self, name: str) -> str:
        """Returns the value of a field that must be a string.

        Raises:
          UserError: no such field, or not a string.
        """
        value = self.require(name)
        if not isinstance(value, str):
            theirs = self.fields.get(name, name)
            raise UserError(
                f"{self.where}: the field {theirs!r} must be text, got {type(value).__name__} {_short(value)}"
            )
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can escape half of a surrogate pair; no tokenizer takes it
            raise UserError(f"{self.where}: the field {name!r} holds half a surrogate pair: {_short(value)}") from None
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def rename(values: Mapping[str, Any], where: str, fields: Mapping[str, str]) -> Record:
    """Makes a record with `values[theirs]` also under our names.

    A name that is mapped to an absent field is absent, even where the data has a field of our name: the user asked for
    the other one.
    """
    renamed = {ours: values[theirs] for ours, theirs in fields.items() if theirs in values}
    kept = {k: v for k, v in values.items() if k not in fields}
    return Record({**kept, **renamed}, where, fields)


def digest(values: Mapping[str, Any], seed: int = 0) -> str:
    """A hash of the content of a record, independent of the order of its fields and of the process."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).hexdigest()


class Splits(dict):
    """`{"train": [Record], "dev": [Record], "test": [Record]}`; an empty list where the data has no such split.

    Attributes:
      notices: what was decided for the user (a hold-out, a limit), one sentence each, to be shown at the start of a
        run.
    """

    def __init__(self, splits: Mapping[str, list[Record]], notices: Iterable[str] = ()):
        super().__init__(splits)
        self.notices = tuple(notices)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of all splits, in order: two runs with the same one saw the same data."""
        total = hashlib.sha256()
        for name, records in self.items():
            total.update(f"{name}:{len(records)};".encode())
            for record in records:
                total.update(digest(record.values).encode())
        return total.hexdigest()
