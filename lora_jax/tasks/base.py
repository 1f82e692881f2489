"""Task: what a batch holds, the loss, the metrics. A frozen dataclass of functions, made by one file per objective.

The device functions (`loss`, `sums`, `per_example`) are pure, jittable and float32. They return sums and weights, never
means: gradient accumulation, uneven batches and meshes add both and divide once.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.data.records import Record, Splits
from lora_jax.errors import UserError, did_you_mean

Array = Any
Example = dict[str, np.ndarray]


def _same(records: Sequence[Record]) -> list[Record]:
    return list(records)


@dataclasses.dataclass(frozen=True)
class Task:
    """One objective on one data set.

    Attributes:
      name: of the file it came from.
      options: every option with its value, as JSON; `tasks.get(name)(..., **options)` makes the task again.
      encode: record -> example, a dict of numpy arrays: (T,) per token, () per example.
      inputs: batch -> keyword arguments of `base.apply`; `targets` are among those of language models, so that outputs
        are likelihoods and no logits.
      loss: (outputs of `base.apply`, batch) -> (sum, weight), float32 scalars.
      sums: (outputs, batch) -> {name: array}, additive over batches.
      summary: sums on the host -> {metric: float}.
      per_example: (outputs, batch) -> {name: (B,S)}; only places with ids >= 0 mean something.
      prediction: (record, values of per_example) -> one line of the predictions file.
      preview: example -> text, one example as the model sees it.
      better: (metric, "min" or "max"): what "best on dev" means.
      labels: names of the classes; None = not a classification.
      prepare: records -> records to encode, one per example. Only language modelling changes them (it cuts texts).
      prompt: record -> token ids to continue; None = the task does not generate.
      references: record -> texts that a continuation is compared with.
      score: (texts, references) -> {metric: value}.
    """

    name: str
    options: Mapping[str, Any]
    encode: Callable[[Record], Example]
    inputs: Callable[[Mapping[str, Array]], dict[str, Array]]
    loss: Callable[[Array, Mapping[str, Array]], tuple[Array, Array]]
    sums: Callable[[Array, Mapping[str, Array]], dict[str, Array]]
    summary: Callable[[Mapping[str, Any]], dict[str, float]]
    per_example: Callable[[Array, Mapping[str, Array]], dict[str, Array]]
    prediction: Callable[[Record, Mapping[str, Any]], dict[str, Any]]
    preview: Callable[..., str]
    better: tuple[str, str]
    labels: tuple[str, ...] | None = None
    prepare: Callable[[Sequence[Record]], list[Record]] = _same
    prompt: Callable[[Record], list[int]] | None = None
    references: Callable[[Record], list[str]] | None = None
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, Any]] | None = None

    @property
    def cuts(self) -> bool:
        """Whether `encode` cuts a text that is too long. `prepare`, where there is one, makes several of it instead."""
        return self.prepare is _same


def inputs(batch: Mapping[str, Array]) -> dict[str, Array]:
    """What `base.apply` needs of a batch.

    One example per row needs no more than a padding mask, which costs (B,T); several need segments and positions,
    (B,T,T).
    """
    out = {key: batch[key] for key in ("tokens", "token_type_ids", "pool_at") if key in batch}
    if batch["ids"].shape[1] == 1:
        return {**out, "attention_mask": batch["segment_ids"] > 0}
    return {**out, "segment_ids": batch["segment_ids"], "positions": batch["positions"]}


def weighted(values: Array, weights: Array) -> Array:
    """values * weights with exact zeros where the weight is zero, whatever the value there (padding may hold NaN)."""
    return jnp.where(weights > 0, values * weights, 0.0)


def ratio(total: Any, weight: Any) -> float:
    """total / weight on the host; NaN when nothing was counted."""
    return float(total) / float(weight) if float(weight) else float("nan")


def check_options(name: str, maker: Callable, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that the task does not have, with the nearest name."""
    known = option_names(maker)
    for option in options:
        if option not in known:
            raise UserError(f"the task {name!r} has no option {option!r}; {did_you_mean(option, known)}")


def option_names(maker: Callable) -> dict[str, Any]:
    """{option: default} of a task: the keyword arguments of its maker beyond the three that every task takes."""
    given = ("tokenizer", "max_length", "splits")
    return {k: p.default for k, p in inspect.signature(maker).parameters.items() if k not in given}


def check_fields(splits: Splits, known: Sequence[str]) -> None:
    """Raises UserError for a name in `data.fields` that the task does not know."""
    for record in next((records for records in splits.values() if records), [])[:1]:
        for name in record.fields:
            if name not in known:
                raise UserError(f"data.fields.{name}: this task has no such field; {did_you_mean(name, known)}")


def check_max_length(max_length: Any, least: int) -> None:
    """Raises UserError for a max_length that is no number or leaves no place for anything."""
    if type(max_length) is not int or max_length < least:
        raise UserError(f"data.max_length must be a whole number of tokens, at least {least}; got {max_length!r}")
