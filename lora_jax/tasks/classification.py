"""Classification of one text or a pair: cross-entropy over the classes, accuracy and F1 from an additive confusion
matrix.

Fields: `text`, `label`, and for pairs `text_pair`. The classes are those of train: numbers in numeric order, names in
alphabetical order. An encoder pools its first token and tells the texts of a pair apart by token types; a decoder pools
its last token and reads a pair as two texts with a separator.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data import preview as previews
from lora_jax.data.records import Record, Splits
from lora_jax.errors import UserError, did_you_mean
from lora_jax.likelihood import cross_entropy
from lora_jax.tasks import base

FIELDS = ("text", "text_pair", "label")
POOLS = ("auto", "first", "last")


def classification(
    tokenizer: Any,
    max_length: int,
    splits: Splits,
    *,
    labels: Sequence[str] | str | None = None,
    pool: str = "auto",
    separator: str = "\n",
) -> base.Task:
    """Makes the task.

    Args:
      tokenizer: any tokenizer of transformers.
      max_length: tokens of an example at most, special ones included; the longer text of a pair is cut first.
      splits: what the classes are read from, and checked at once.
      labels: the classes in their order (a sequence or a comma-separated string); None = those of train.
      pool: which token is classified: "first", "last", or "auto": the first if the tokenizer starts texts with [CLS].
      separator: between the texts of a pair when the tokenizer has no separator token of its own.

    Raises:
      UserError: a missing field, fewer than two classes, a label of dev or test that train does not have.
    """
    base.check_max_length(max_length, 4)
    base.check_fields(splits, FIELDS)
    if pool not in POOLS:
        raise UserError(f"the option pool={pool!r} is not one of {', '.join(POOLS)}")
    names = _labels(splits, labels)
    pair = _has_pairs(splits)
    first = pool == "first" or (pool == "auto" and _starts_with_cls(tokenizer))
    encoder = _Encoder(tokenizer, max_length, names, pair, first, separator)
    return base.Task(
        name="classification",
        options={"labels": list(names), "pool": "first" if first else "last", "separator": separator},
        encode=encoder,
        inputs=base.inputs,
        loss=_loss,
        sums=_sums,
        summary=_summary,
        per_example=_per_example,
        prediction=lambda record, values: _prediction(names, record, values),
        preview=lambda example, colour=False: previews.labelled(example, tokenizer, names, colour),
        better=("accuracy", "max"),
        labels=names,
    )


def label_name(record: Record) -> str:
    """The label as text: true/false for booleans, digits for whole numbers (1.0 is 1, as tables store it).

    Raises:
      UserError: no label, or one that names no class.
    """
    value = record.require("label")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)) or value == "":
        name = record.fields.get("label", "label")
        raise UserError(f"{record.where}: the field {name!r} must name a class (text or a whole number), got {value!r}")
    return str(value)


def _labels(splits: Splits, given: Sequence[str] | str | None) -> tuple[str, ...]:
    """The classes; every record of every split is checked here, before anything costs time."""
    found: dict[str, dict[str, str]] = {split: {} for split in splits}
    for split, records in splits.items():
        for record in records:
            record.text("text")
            found[split].setdefault(label_name(record), record.where)
    names = _given(given) if given is not None else sorted(found.get("train", ()), key=_order)
    if len(names) < 2:
        raise UserError(
            f"classification needs at least two classes; train has {len(names)}: {', '.join(names) or 'no record'}. "
            "Is data.fields.label the right field?"
        )
    for split, labels in found.items():
        for label, where in labels.items():
            if label not in names:
                source = "train" if given is None else "the option labels"
                raise UserError(
                    f"{where}: the label {label!r} of {split} is not one of the {len(names)} labels of {source}; "
                    f"{did_you_mean(label, names)}"
                )
    return tuple(names)


def _given(labels: Sequence[str] | str) -> list[str]:
    names = [x.strip() for x in labels.split(",")] if isinstance(labels, str) else [str(x) for x in labels]
    if len(set(names)) < len(names):
        raise UserError(f"the option labels names a class twice: {', '.join(names)}")
    return names


def _order(label: str) -> tuple:
    return (0, int(label), label) if label.lstrip("-").isdecimal() else (1, 0, label)


def _has_pairs(splits: Splits) -> bool:
    records = [record for split in splits.values() for record in split]
    pair = any("text_pair" in record.values or "text_pair" in record.fields for record in records)
    for record in records if pair else ():
        record.text("text_pair")
    return pair


def _starts_with_cls(tokenizer: Any) -> bool:
    cls = getattr(tokenizer, "cls_token_id", None)
    return cls is not None and list(tokenizer("a")["input_ids"])[:1] == [cls]


class _Encoder:
    """record -> tokens, label, the position that is classified, and token types where they tell two texts apart."""

    def __init__(self, tokenizer, max_length: int, labels: Sequence[str], pair: bool, first: bool, separator: str):
        self.tokenizer, self.max_length, self.pair, self.first = tokenizer, max_length, pair, first
        self.numbers = {name: i for i, name in enumerate(labels)}
        self.native = pair and getattr(tokenizer, "sep_token_id", None) is not None
        self.separator = separator
        self.types = self.native and "token_type_ids" in tokenizer.model_input_names

    def __call__(self, record: Record) -> base.Example:
        texts = [record.text("text")] + ([record.text("text_pair")] if self.pair else [])
        if self.pair and not self.native:
            texts = [self.separator.join(texts)]
        encoded = self.tokenizer(
            *texts,
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=self.types,
            return_attention_mask=False,
        )
        tokens = np.asarray(encoded["input_ids"], np.int32)
        if not tokens.size:
            raise UserError(f"{record.where}: the text is empty and the tokenizer adds nothing to it; drop the record")
        example = {"tokens": tokens}
        if self.types:
            example["token_type_ids"] = np.asarray(encoded["token_type_ids"], np.int32)
        example["labels"] = np.asarray(self.numbers[label_name(record)], np.int32)
        example["pool_at"] = np.asarray(0 if self.first else len(tokens) - 1, np.int32)
        return example


def _parts(outputs, batch):
    """(logits, labels, weights), flattened over batch and segments: (N,L), (N,), (N,)."""
    logits_NxL = outputs.reshape(-1, outputs.shape[-1]).astype(jnp.float32)
    weights_N = (batch["ids"].reshape(-1) >= 0).astype(jnp.float32)
    return logits_NxL, batch["labels"].reshape(-1), weights_N


def _loss(outputs, batch):
    logits, labels, weights = _parts(outputs, batch)
    return jnp.sum(base.weighted(cross_entropy(logits, labels), weights)), jnp.sum(weights)


def _sums(outputs, batch):
    logits, labels, weights = _parts(outputs, batch)
    total, weight = _loss(outputs, batch)
    classes = logits.shape[-1]
    true_NxL = jax.nn.one_hot(labels, classes) * weights[:, None]
    guess_NxL = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
    # Counts are whole numbers below 2^24, which float32 holds exactly. [i, j]: class i taken for class j.
    return {"loss": total, "weight": weight, "confusion": true_NxL.T @ guess_NxL}


def _summary(sums: Mapping[str, Any]) -> dict[str, float]:
    confusion = np.asarray(sums["confusion"], np.float64)
    hits = np.diag(confusion)
    # F1 = 2 TP / (true + guessed); a class that is neither there nor guessed counts as 0, as scikit-learn does.
    f1 = 2 * hits / np.maximum(confusion.sum(0) + confusion.sum(1), 1)
    out = {
        "loss": base.ratio(sums["loss"], sums["weight"]),
        "accuracy": base.ratio(hits.sum(), sums["weight"]),
        "macro_f1": float(f1.mean()),
    }
    if len(f1) == 2:
        out["f1"] = float(f1[1])  # of the second class: 1, true, yes, positive
    return out


def _per_example(outputs, batch):
    shape = batch["ids"].shape
    logits, labels, _ = _parts(outputs, batch)
    guess = jnp.argmax(logits, axis=-1)
    log_probability = -cross_entropy(logits, guess)
    return {
        "loss": cross_entropy(logits, labels).reshape(shape),
        "guess": guess.reshape(shape),
        "probability": jnp.exp(log_probability).reshape(shape),
    }


def _prediction(labels: Sequence[str], record: Record, values: Mapping[str, Any]) -> dict[str, Any]:
    label, guess = label_name(record), labels[int(values["guess"])]
    loss = float(values["loss"])
    return {
        "label": label,
        "prediction": guess,
        "correct": label == guess,
        "probability": float(values["probability"]),
        "loss": loss if math.isfinite(loss) else None,
    }
