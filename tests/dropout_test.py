"""Dropout drops at its rate, keeps the expectation, and its bits show no pattern that a sample of them could show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.dropout import bits, drop, hashed


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


def by_hand(x, key):
    """`hashed` in Python's own integers."""
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x ^= x >> shift
        x = (x ^ (key if shift == 11 else 0)) * factor % 2**32
    return x ^ (x >> 14)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5)])
def test_bits_are_a_hash_of_row_and_place(shape):
    key = jax.random.key(5)
    one, two = map(int, jax.random.key_data(key))
    size, expected = int(np.prod(shape[1:])), []
    for row in range(shape[0]):
        first, second = by_hand(row ^ one, two), by_hand((row + two) % 2**32, one)
        expected += [by_hand(place ^ first, second) for place in range(size)]
    np.testing.assert_array_equal(np.asarray(bits(key, shape)).reshape(-1), expected)
    longer = bits(key, (shape[0] + 2, *shape[1:]))
    np.testing.assert_array_equal(longer[: shape[0]], bits(key, shape))  # rows draw for themselves


def test_every_bit_of_the_hash_depends_on_every_bit():
    """One-to-one, and a flipped bit of the input flips every bit of the output in half of all cases."""
    x = jnp.arange(2**16, dtype=jnp.uint32) * jnp.uint32(65521)
    out = hashed(x, jnp.uint32(0))
    assert len(np.unique(out)) == len(x)
    for place in range(32):
        changed = np.asarray(out ^ hashed(x ^ jnp.uint32(1 << place), jnp.uint32(0)))
        flips = np.unpackbits(changed.view(np.uint8)).reshape(len(x), 32).mean(axis=0)
        assert np.abs(flips - 0.5).max() < 5.5 * 0.5 / np.sqrt(len(x))


def away(mine, other):
    """Standard deviations by which two draws agree more or less often than chance."""
    return abs(np.mean(mine == other) - 0.5) / (0.5 / np.sqrt(mine.size))


@pytest.mark.parametrize("bit", [31, 16, 0])
def test_bits_are_as_if_drawn_anew(bit):
    """Along rows, down the columns, from key to key, folded or counted, and for keys that share a word."""
    draw = lambda key: np.asarray(bits(key, (256, 1024)) >> bit & 1)  # noqa: E731
    mine, key = draw(jax.random.key(0)), jax.random.key(0)
    assert abs(mine.mean() - 0.5) < 5 * 0.5 / np.sqrt(mine.size)
    for lag in (1, 2, 3, 4, 8, 32, 64, 128, 256, 512):
        assert away(mine[:, lag:], mine[:, :-lag]) < 5
        assert lag > 128 or away(mine[lag:], mine[:-lag]) < 5
    words = ([1, 0], [0, 2**31], [1, 1], [1024, 0], [2**32 - 1, 2**32 - 1])
    raw = [jax.random.wrap_key_data(jnp.asarray(pair, jnp.uint32)) for pair in words]
    others = [jax.random.fold_in(key, i) for i in range(8)] + [jax.random.key(i) for i in range(1, 8)] + raw
    drawn = [mine, *map(draw, others)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert away(one, other) < 5
            assert away(one[1:], other[:-1]) < 5 and away(one[:, 1:], other[:, :-1]) < 5


def test_a_row_is_no_other_row_in_another_order():
    """Rows whose first words differ in their low bits alone: without the second they would hold the same numbers."""
    key, count, size = jax.random.key(0), 2000, 2**16
    words, rows = jax.random.key_data(key), jnp.arange(count, dtype=jnp.uint32)
    high = np.asarray(hashed(rows ^ words[0], words[1]) >> 16)
    values, places, counts = np.unique(high, return_index=True, return_counts=True)
    one = int(places[counts > 1][0])
    other = int(np.flatnonzero(high == high[one])[1])
    drawn = np.asarray(jax.jit(lambda: bits(key, (count, size))[jnp.asarray([one, other])])())
    assert np.isin(drawn[0], drawn[1]).mean() < 1e-3


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
