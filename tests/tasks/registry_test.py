"""Tasks are found by their file, and options they do not have are refused with the nearest name."""

import jax
import jax.numpy as jnp
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


def test_cross_entropy_is_exact_and_stable():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 4, 7)), rng.integers(0, 7, (3, 4))
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(base.cross_entropy(logits, targets), expected, rtol=1e-5)
    np.testing.assert_allclose(base.cross_entropy(logits * 1e4, targets).min(), 0, atol=1e-6)
    assert np.isfinite(base.cross_entropy(logits * 1e4, targets)).all()
    half = base.cross_entropy(np.asarray(logits, np.float16), targets)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, expected, atol=5e-3)


def test_the_derivative_of_cross_entropy():
    """Against plain autodiff, with a factor of its own for every token; the dtype is that of the logits."""
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(rng.normal(size=(3, 4, 7)), jnp.float32), jnp.asarray(rng.integers(0, 7, (3, 4)))
    factors = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    plain = lambda z: -jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0]  # noqa: E731
    found = jax.grad(lambda z: jnp.sum(factors * base.cross_entropy(z, targets)))(logits)
    expected = jax.grad(lambda z: jnp.sum(factors * plain(z)))(logits)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    half = jax.grad(lambda z: jnp.sum(factors * base.cross_entropy(z, targets)))(logits.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.02)


def test_a_loss_passes_over_the_logits_less_often():
    """A step's loss and its gradient, beside plain autodiff, which also keeps the exponentials."""
    x, w, targets = jnp.ones((256, 16)), jnp.ones((16, 4096)), jnp.zeros(256, jnp.int32)

    def passes(nll):
        step = jax.jit(jax.value_and_grad(lambda x: jnp.sum(nll(x @ w, targets))))
        return step.lower(x).compile().cost_analysis()["bytes accessed"] / (256 * 4096 * 4)

    plain = lambda z, t: jax.nn.logsumexp(z, axis=-1) - jnp.sum(jnp.where(base._hit(z, t), z, 0.0), axis=-1)  # noqa: E731
    assert passes(base.cross_entropy) < 0.9 * passes(plain)


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
