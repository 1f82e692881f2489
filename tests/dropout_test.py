"""Dropout drops at its rate, keeps the expectation exactly, and draws half a word for an entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.dropout import drop, kept_ways


@pytest.mark.parametrize("rate", [1e-9, 0.05, 0.1, 0.5, 0.9, 0.99999999])
@pytest.mark.parametrize("shape", [(300, 1000), (300, 1001)])
def test_the_rate_and_the_expectation(rate, shape):
    x = np.random.default_rng(0).uniform(1.0, 2.0, shape).astype(np.float32)
    y = np.asarray(drop(jax.random.key(1), rate, x))
    kept = y != 0
    exact = kept_ways(rate) / 2**16
    assert abs(exact - (1 - rate)) <= 2**-16
    deviation = np.sqrt(exact * (1 - exact) / x.size)
    assert abs(kept.mean() - exact) < 5 * deviation  # of the binomial distribution
    # Both halves of the words, and each column by itself.
    half = shape[1] // 2
    for part in (kept[:, :half], kept[:, half:]):
        assert abs(part.mean() - exact) < 7 * deviation
    np.testing.assert_allclose(y[kept], x[kept] / exact, rtol=1e-6)


def test_entries_are_independent():
    kept = np.asarray(drop(jax.random.key(0), 0.5, jnp.ones((4000, 8)))) != 0
    together = np.corrcoef(kept.T) - np.eye(8)  # entries that share a word are 4 apart
    assert np.abs(together).max() < 5 / np.sqrt(4000)
    other = np.asarray(drop(jax.random.key(1), 0.5, jnp.ones((4000, 8)))) != 0
    assert abs(np.mean(kept == other) - 0.5) < 5 * 0.5 / np.sqrt(kept.size)


def test_the_same_key_drops_the_same_jitted_or_in_a_batch_of_keys():
    x = jnp.ones((5, 7))
    keys = jax.random.split(jax.random.key(3), 4)
    alone = np.stack([drop(key, 0.3, x) for key in keys])
    np.testing.assert_array_equal(np.asarray(jax.vmap(lambda key: drop(key, 0.3, x))(keys)), alone)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda key: drop(key, 0.3, x))(keys[0])), alone[0])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 0), (0, 3)])
def test_small_shapes(shape):
    assert drop(jax.random.key(0), 0.5, jnp.ones(shape)).shape == shape


def test_at_rate_one_everything_goes_and_dtypes_stay():
    assert not np.any(drop(jax.random.key(0), 1.0, jnp.full((4, 4), jnp.inf)))
    assert drop(jax.random.key(0), 0.1, jnp.ones((4, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_word_serves_two_entries():
    program = jax.make_jaxpr(lambda key, x: drop(key, 0.1, x))(jax.random.key(0), jnp.ones((16, 64))).jaxpr
    drawn = [v.aval.size for eqn in program.eqns if eqn.primitive.name == "random_bits" for v in eqn.outvars]
    assert drawn == [16 * 32]
