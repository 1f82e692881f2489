"""Dropout drops at its rate, keeps the expectation, and draws what JAX's own generator would for the same counters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from lora_jax.dropout import bits, drop, threefry


@pytest.mark.parametrize("rate", [1e-12, 0.05, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(300, 1000), (3, 100, 999)])
def test_the_rate_and_the_expectation(rate, shape):
    x = np.random.default_rng(0).uniform(1.0, 2.0, shape).astype(np.float32)
    y = np.asarray(drop(jax.random.key(1), rate, x))
    kept = y != 0
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation + 1e-9  # of the binomial distribution
    np.testing.assert_allclose(y[kept], x[kept] / (1 - rate), rtol=1e-6)


def test_entries_are_independent():
    kept = np.asarray(drop(jax.random.key(0), 0.5, jnp.ones((4000, 8)))) != 0
    for table in (kept, kept.reshape(500, 64)):  # neighbours along a row, and down the rows
        count = table.shape[1]
        together = np.corrcoef(table.T) - np.eye(count)
        assert np.abs(together).max() < 5.5 / np.sqrt(len(table))
    other = np.asarray(drop(jax.random.key(1), 0.5, jnp.ones((4000, 8)))) != 0
    assert abs(np.mean(kept == other) - 0.5) < 5 * 0.5 / np.sqrt(kept.size)


def test_threefry_is_that_of_jax():
    rng = np.random.default_rng(0)
    for _ in range(5):
        key, counters = (jnp.asarray(rng.integers(0, 2**32, n, np.uint32)) for n in (2, 2000))
        mine = threefry(key, counters[:1000], counters[1000:])
        np.testing.assert_array_equal(np.concatenate(mine), threefry_2x32(key, counters))


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5)])
def test_bits_are_counted_by_row_and_place(shape):
    key = jax.random.key(5)
    size = int(np.prod(shape[1:]))
    places = np.tile(np.arange(size, dtype=np.uint32), shape[0])
    rows = np.repeat(np.arange(shape[0], dtype=np.uint32), size)
    counters = jnp.asarray(np.concatenate([places, rows]))
    expected = threefry_2x32(jax.random.key_data(key), counters)[: places.size]
    np.testing.assert_array_equal(np.asarray(bits(key, shape)).reshape(-1), expected)
    longer = bits(key, (shape[0] + 2, *shape[1:]))
    np.testing.assert_array_equal(longer[: shape[0]], bits(key, shape))  # rows draw for themselves


def test_the_same_key_drops_the_same_jitted_or_in_a_batch_of_keys():
    x = jnp.ones((5, 7))
    keys = jax.random.split(jax.random.key(3), 4)
    alone = np.stack([drop(key, 0.3, x) for key in keys])
    np.testing.assert_array_equal(np.asarray(jax.vmap(lambda key: drop(key, 0.3, x))(keys)), alone)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda key: drop(key, 0.3, x))(keys[0])), alone[0])
    assert (alone[0] != alone[1]).any()


@pytest.mark.parametrize("shape", [(), (1,), (2, 0), (0, 3)])
def test_small_shapes(shape):
    assert drop(jax.random.key(0), 0.5, jnp.ones(shape)).shape == shape


def test_at_rate_one_everything_goes_and_dtypes_stay():
    assert not np.any(drop(jax.random.key(0), 1.0, jnp.full((4, 4), jnp.inf)))
    assert drop(jax.random.key(0), 0.1, jnp.ones((4, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_keys_of_another_kind_draw_too():
    y = drop(jax.random.key(0, impl="rbg"), 0.5, jnp.ones((100, 100)))
    assert abs(np.mean(np.asarray(y) != 0) - 0.5) < 0.03


def test_nothing_is_kept_for_the_backward_pass():
    def loss(x, key):
        return jnp.sum(drop(key, 0.5, x) ** 2)

    program = jax.jit(jax.grad(jax.checkpoint(loss))).lower(jnp.ones((512, 512)), jax.random.key(0)).compile()
    assert "while" not in program.as_text()  # one pass, no loop over arrays in memory
    assert program.memory_analysis().temp_size_in_bytes < 512 * 512


def test_masks_of_one_shape_share_a_trace():
    twice = jax.make_jaxpr(lambda key, x: drop(key, 0.1, x) + drop(jax.random.fold_in(key, 1), 0.2, x))
    steps = twice(jax.random.key(0), jnp.ones((3, 4))).eqns
    bodies = [eqn.params["jaxpr"] for eqn in steps if eqn.params.get("name") == "_of_places"]
    assert len(bodies) == 2 and bodies[0] is bodies[1]


@pytest.mark.parametrize("spec", [("x",), (None, "x")], ids=["rows", "columns"])
def test_the_same_entries_go_on_a_mesh_and_nothing_is_gathered(spec):
    x, key = jnp.ones((16, 24)), jax.random.key(3)
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
    program = jax.jit(lambda x: drop(key, 0.5, x)).lower(split).compile()
    np.testing.assert_array_equal(program(split), drop(key, 0.5, x))
    assert "all-gather" not in program.as_text() and program(split).sharding.is_equivalent_to(split.sharding, 2)
