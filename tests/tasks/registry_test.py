"""Tasks are found by their file, and options they do not have are refused with the nearest name."""

import numpy as np
import pytest

from lora_jax import tasks
from lora_jax.data import Record, Splits
from lora_jax.errors import UserError
from lora_jax.tasks import base


def splits(*values, **fields):
    return Splits({"train": [Record(v, f"train.jsonl line {i}", fields) for i, v in enumerate(values, 1)]})


def test_names_are_files():
    assert {"classification", "language_modeling", "sft"} <= set(tasks.names())
    for name in tasks.names():
        assert callable(tasks.get(name)) and isinstance(tasks.options(name), dict)


def test_unknown_names():
    with pytest.raises(UserError, match="there is no task 'clasification'; did you mean 'classification'"):
        tasks.get("clasification")
    for hidden in ("base", "causal", "", None):
        with pytest.raises(UserError, match="there is no task"):
            tasks.get(hidden)
    with pytest.raises(UserError, match="the task 'sft' has no option 'loss'; did you mean 'loss_on'"):
        tasks.get("sft")(tokenizer=None, max_length=8, splits=splits(), loss=1)


def test_every_task_names_a_field_of_data_fields_that_it_lacks(decoder_tokenizer):
    for name, record in (
        ("classification", {"a": "x", "label": "y"}),
        ("language_modeling", {"a": "x"}),
        ("sft", {"prompt": "x", "completion": "y", "a": "z"}),
    ):
        with pytest.raises(UserError, match="data.fields.texts: this task has no such field; did you mean"):
            tasks.get(name)(tokenizer=decoder_tokenizer, max_length=16, splits=splits(record, texts="a"))
        with pytest.raises(UserError, match="data.max_length must be a whole number of tokens, at least"):
            tasks.get(name)(tokenizer=decoder_tokenizer, max_length=0, splits=splits(record))


def test_options_of_a_task_make_it_again(decoder_tokenizer):
    values = {
        "classification": [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}],
        "language_modeling": [{"text": "x"}],
        "sft": [{"prompt": "x", "completion": "y"}],
    }
    for name in tasks.names():
        made = tasks.get(name)(tokenizer=decoder_tokenizer, max_length=16, splits=splits(*values[name]))
        assert set(made.options) == set(tasks.options(name)) and made.name == name
        again = tasks.get(name)(
            tokenizer=decoder_tokenizer, max_length=16, splits=splits(*values[name]), **made.options
        )
        assert again.options == made.options and again.labels == made.labels


def test_padding_never_reaches_a_sum():
    np.testing.assert_array_equal(base.weighted(np.array([1.0, np.nan]), np.array([2.0, 0.0])), [2.0, 0.0])


def test_inputs_hold_what_the_model_needs():
    batch = {k: np.ones((2, 4), np.int32) for k in ("tokens", "segment_ids", "positions", "targets")}
    batch["segment_ids"][:, 3] = 0
    one = base.inputs({**batch, "ids": np.zeros((2, 1))})
    assert set(one) == {"tokens", "attention_mask"}
    assert one["attention_mask"].tolist() == [[True, True, True, False]] * 2
    several = base.inputs({**batch, "ids": np.zeros((2, 3)), "pool_at": np.zeros((2, 3)), "labels": np.zeros((2, 3))})
    assert set(several) == {"tokens", "segment_ids", "positions", "pool_at"}
