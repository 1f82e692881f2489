"""Language modelling: every token of a text is predicted from those before it; perplexity.

Field: `text`. Two ways to make rows of texts (option `chunks`):
* `"records"`: a text is an example of its own, begun and ended by the tokenizer's special tokens. A long one is cut
  into consecutive parts that overlap by one token, so that each token is a target exactly once. Packing puts several
  into a row.
* `"contiguous"`: all texts in order, joined into one stream that is cut into rows of `max_length`. Nothing is padded,
  but a row may begin in the middle of a text and hold parts of several.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.data import preview as previews
from lora_jax.data.records import Record, Splits
from lora_jax.errors import UserError, did_you_mean
from lora_jax.tasks import base, causal

CHUNKS = ("records", "contiguous")
IDS = "input_ids"  # the field of a prepared record: its tokens


def language_modeling(
    tokenizer: Any,
    max_length: int,
    splits: Splits,
    *,
    chunks: str = "records",
    separator: str | None = None,
) -> base.Task:
    """Makes the task.

    Args:
      tokenizer: any tokenizer of transformers.
      max_length: tokens of a row.
      splits: checked for the field `text` at once.
      chunks: "records" or "contiguous", see above.
      separator: text between two texts of a contiguous stream; None = the end-of-sequence token.

    Raises:
      UserError: a missing field, or an option that does not exist.
    """
    base.check_max_length(max_length, 1)
    base.check_fields(splits, ("text",))
    if chunks not in CHUNKS:
        raise UserError(f"the option chunks={chunks!r} does not exist; {did_you_mean(str(chunks), CHUNKS)}")
    if separator is not None and chunks != "contiguous":
        raise UserError("the option separator only joins texts of chunks='contiguous'")
    for records in splits.values():
        for record in records:
            record.text("text")
    cutter = _Cutter(tokenizer, max_length, separator)
    return base.Task(
        name="language_modeling",
        options={"chunks": chunks, "separator": separator},
        prepare=cutter.records if chunks == "records" else cutter.contiguous,
        encode=cutter.encode,
        inputs=causal.inputs,
        loss=causal.loss,
        sums=causal.sums,
        summary=causal.summary,
        per_example=causal.per_example,
        prediction=causal.prediction,
        preview=lambda example, colour=False: previews.language(example, tokenizer, colour),
        better=("loss", "min"),
    )


class _Cutter:
    """Cuts texts into records of at most `max_length` + 1 tokens, of which a row holds all but the last."""

    def __init__(self, tokenizer: Any, max_length: int, separator: str | None):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.start = causal.start(tokenizer)
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.joint = self.end if separator is None else causal.encode(tokenizer, separator)

    def encode(self, record: Record) -> base.Example:
        """One example; a record that was not prepared must fit into a row."""
        ids = record.values.get(IDS)
        if ids is None:
            ids = self._whole(record)
        if len(ids) > self.max_length + 1:
            raise UserError(f"{record.where} has {len(ids)} tokens; cut long texts by task.prepare before task.encode")
        return causal.example(ids, [True] * len(ids))

    def records(self, records: Sequence[Record]) -> list[Record]:
        """Each text on its own, in parts."""
        parts = [self._parts(self._whole(record), record.where) for record in records]
        _report(sum(bool(p) for p in parts), len(parts))
        return [part for own in parts for part in own]

    def contiguous(self, records: Sequence[Record]) -> list[Record]:
        """All texts as one stream, in parts."""
        stream = list(self.start)
        for i, record in enumerate(records):
            stream += (self.joint if i else []) + causal.encode(self.tokenizer, record.text("text"))
        return self._parts(stream + self.end, f"{records[0].where} and those after it" if records else "no record")

    def _whole(self, record: Record) -> list[int]:
        return self.start + causal.encode(self.tokenizer, record.text("text")) + self.end

    def _parts(self, ids: list[int], where: str) -> list[Record]:
        # A part shares its first token with the one before it, where that token was only a target.
        starts = range(0, len(ids) - 1, self.max_length)
        cut = [np.asarray(ids[s : s + self.max_length + 1], np.int32) for s in starts]
        names = [where] if len(cut) == 1 else [f"{where}, part {i}" for i in range(1, len(cut) + 1)]
        return [Record({IDS: part}, name) for part, name in zip(cut, names, strict=True)]


def _report(kept: int, given: int) -> None:
    if given and not kept:
        raise UserError(
            f"none of the {given} texts has two tokens, so there is nothing to predict; is data.fields.text right?"
        )
    if kept < given:
        logging.getLogger(__name__).warning(
            "%d of %d texts have fewer than two tokens and are left out", given - kept, given
        )
