"""What oft promises beyond the conformance suite: orthogonality, the formula by hand, sizes of blocks, messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.oft import inverse, rotation_less_identity
from tests.adapters import kinds
from tests.adapters.lora_test import site, start
from tests.lift.checks import bits_equal, close, noisy


def skew(q, size):
    """Q by hand: entries above the diagonal row by row, their opposites below."""
    out = np.zeros((size, size))
    entries = iter(np.asarray(q, np.float64))
    for i in range(size):
        for j in range(i + 1, size):
            out[i, j] = next(entries)
            out[j, i] = -out[i, j]
    return out


def rotation(one, width):
    """R by hand: Cayley's (I + Q)(I - Q)^-1 block by block."""
    out, size = np.zeros((width, width)), one.size
    for k in range(width // size):
        s = skew(one.q[min(k, len(one.q) - 1)], size)
        out[k * size : (k + 1) * size, k * size : (k + 1) * size] = (np.eye(size) + s) @ np.linalg.inv(np.eye(size) - s)
    return out


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("kind", "path"), [("heads out", "in_0/kernel"), ("heads in", "back_1/kernel")])
def test_merged_weight_by_hand(kind, path, share):
    """R W along the flattened fan_in, and R is orthogonal after a random move."""
    kind = dataclasses.replace(kinds.get(kind), weights=path)
    adapter = kinds.make("oft", kind, block_size=4, share_blocks=share)
    delta = noisy(adapter.init(jax.random.key(0), kind.variables, kind.sites))
    base, merged = kind.variables["params"], adapter.merge(kind.variables, delta)["params"]
    for key in path.split("/"):
        base, merged = base[key], merged[key]
    r = rotation(delta[path], 8)
    np.testing.assert_allclose(r @ r.T, np.eye(8), atol=1e-12)
    assert np.abs(r - np.eye(8)).max() > 0.1 and np.array_equal(r[:4, :4], r[4:, 4:]) == share
    np.testing.assert_allclose(merged, (r @ np.reshape(base, (8, -1))).reshape(base.shape), rtol=1e-5, atol=1e-6)


def test_exact_is_orthogonal_and_keeps_angles():
    """R R^T = I at any size of Q; all neurons keep their lengths and angles: W^T W stays (eq. 1)."""
    for size in (0.1, 1.0, 10.0):
        delta = noisy(start(lj.oft(6), site("w", (12, 7))), size)
        r = np.eye(6) + np.asarray(rotation_less_identity(delta["w"].q, 6))
        np.testing.assert_allclose(r @ r.swapaxes(-1, -2), np.broadcast_to(np.eye(6), r.shape), atol=2e-5)
    w = noisy({"w": jnp.zeros((12, 7))})
    turned = lj.oft(6).merge(w, delta)["w"]
    np.testing.assert_allclose(turned.T @ turned, w["w"].T @ w["w"], atol=1e-5)
    assert np.abs(turned - w["w"]).max() > 0.1


@pytest.mark.parametrize(
    ("terms", "factors"),
    [(2, [2]), (3, [2, 2, 1]), (4, [2, 2, 1]), (5, [2, 2, 2, 1]), (7, [2, 2, 2, 2, 2, 1])],
)
def test_polynomial_by_hand(terms, factors):
    """PEFT's: twice every power but the last, three terms as four, two terms linear."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(6,)), jnp.float32)
    s = skew(q, 4)
    expected = sum(f * np.linalg.matrix_power(s, i + 1) for i, f in enumerate(factors))
    np.testing.assert_allclose(rotation_less_identity(q, 4, terms), expected, rtol=1e-4, atol=1e-5)


def test_polynomial_approaches_the_inverse():
    q = 0.1 * jnp.asarray(np.random.default_rng(0).normal(size=(6,)), jnp.float32)
    exact = rotation_less_identity(q, 4)
    errors = [float(np.abs(rotation_less_identity(q, 4, terms) - exact).max()) for terms in (2, 4, 6, 12)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2 and errors[-1] < 1e-5


@pytest.mark.parametrize("shape", [(12, 7), (8, 20)])
def test_product_either_way(shape):
    """x W turns the activation, x W^T the output."""
    adapter = lj.oft(4)
    delta = noisy(start(adapter, site("w", shape)))
    variables = noisy({"w": jnp.zeros(shape)})
    for i, function in enumerate((lambda v, x: x @ v["w"], lambda v, x: x @ v["w"].T)):
        x = jnp.asarray(np.random.default_rng(i).normal(size=(3, shape[i])), jnp.float32)
        out = lj.lift(function)(adapter.bind(variables, delta), x)
        close(out, function(adapter.merge(variables, delta), x), 1e-5)
        assert np.abs(out - function(variables, x)).max() > 1e-2


def test_an_embedding_is_turned_along_its_width():
    """Every row by the same rotation: tokens are not mixed."""
    where = site("w", (10, 6), uses=("embedding", "linear"))
    adapter = lj.oft(3, targets="w")
    delta = noisy(start(adapter, where))
    assert delta["w"].q.shape == (2, 3)
    table = np.zeros((10, 6), np.float32)
    table[4] = np.arange(6)
    turned = np.asarray(adapter.merge({"w": jnp.asarray(table)}, delta)["w"])
    np.testing.assert_allclose(turned[4], rotation(delta["w"], 6) @ table[4], rtol=1e-5)
    assert not np.any(np.delete(turned, 4, axis=0))


@pytest.mark.parametrize(
    ("width", "options", "size", "count"),
    [
        (64, {}, 32, 2),
        (48, {}, 24, 2),
        (37, {}, 37, 1),  # no divisor but 1 up to 32
        (6, {}, 6, 1),
        (48, {"block_size": 8}, 8, 6),
        (48, {"blocks": 8}, 6, 8),
        (48, {"block_size": [("other|w", 4)]}, 4, 12),
        (48, {"block_size": 8, "share_blocks": True}, 8, 1),
    ],
)
def test_sizes_and_number_of_parameters(width, options, size, count):
    one = start(lj.oft(**options), site("w", (width, 5)))["w"]
    assert one.size == size and one.q.shape == (count, size * (size - 1) // 2)


def test_layers_left_out_stay_as_they_are():
    """No gradient and no turn, even if something stands in their place."""
    where = site("w", (3, 8, 6), batch=(0,), layer_axis=0)
    adapter = lj.oft(4, layers=[1])
    delta = noisy(start(adapter, where))
    variables = noisy({"w": jnp.zeros((3, 8, 6))})
    merged = adapter.merge(variables, delta)["w"]
    bits_equal(merged[0], variables["w"][0])
    bits_equal(merged[2], variables["w"][2])
    assert np.abs(merged[1] - variables["w"][1]).max() > 1e-2
    grads = jax.grad(lambda d: jnp.sum(adapter.merge(variables, d)["w"] ** 3))(delta)["w"].q
    assert np.any(grads[1]) and not np.any(grads[0]) and not np.any(grads[2])
    found = lj.audit(adapter, delta, variables, {"w": where})
    assert found.trainable == 2 * 6 and found.rows[0].what == "oft, blocks of 4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 5}, "oft: block_size=5 does not fit 'w', whose fan_in is 12; valid: 2, 3, 4, 6, 12"),
        ({"block_size": 1}, "valid: 2, 3, 4, 6, 12"),
        ({"block_size": 4.0}, "block_size=4.0 does not fit"),
        ({"blocks": 5}, "oft: blocks=5 does not fit 'w', whose fan_in is 12; valid: 1, 2, 3, 4, 6"),
        ({"blocks": 2, "block_size": 6}, "give block_size=6 or blocks=2, not both"),
        ({"cayley": "neuman"}, "oft: cayley='neuman' is unknown, also 'neumann:k'; did you mean 'neumann'?"),
        ({"cayley": "neumann:1"}, "a polynomial of fewer than 2 terms is the identity"),
        ({"share_blocks": 2}, "oft: share_blocks=2 is unknown"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(lj.UserError) as caught:
        start(lj.oft(**options), site("w", (12, 7)))
    assert message in str(caught.value)


def test_more_mistakes():
    with pytest.raises(lj.UserError, match="cannot turn 'w' of shape .*: its fan_in is 1; leave it out"):
        start(lj.oft(), site("w", (1, 7)))
    stack = site("w", (2, 8, 6), batch=(0,), layer_axis=0)
    with pytest.raises(lj.UserError, match=r"layers of the stack 'w' need one block_size, got \[2, 4\]"):
        start(lj.oft([("w#0", 2), (".*", 4)]), stack)
    adapter = lj.oft()
    with pytest.raises(lj.UserError, match="oft has no scale"):
        adapter.bind({"w": jnp.zeros((2, 8, 6))}, start(adapter, stack), scale=2.0)


@pytest.mark.parametrize("method", ["oft", "lokr"])
def test_axes_merged_in_another_order_than_the_weights(method):
    """What is flattened has its order: the weight is made dense rather than shuffled, and only with leave."""

    def function(v, x):
        return x @ v["w"].transpose(1, 0, 2).reshape(12, 5)

    variables, x = noisy({"w": jnp.zeros((2, 6, 5))}), noisy(jnp.zeros((3, 12)))
    adapter = lj.adapters.get(method)()
    delta = noisy(adapter.init(jax.random.key(0), variables, lj.find_sites(function, variables, x)))
    bound = adapter.bind(variables, delta)
    with pytest.raises(lj.UserError, match="reshape"):
        lj.lift(function)(bound, x)
    out = lj.lift(function, on_dense="allow")(bound, x)
    close(out, function(adapter.merge(variables, delta), x), 1e-5)


def test_a_slice_along_fan_out_is_turned_alike():
    adapter, variables, x = lj.oft(3), noisy({"w": jnp.zeros((6, 8))}), noisy(jnp.zeros((3, 6)))
    delta = noisy(start(adapter, site("w", (6, 8))))
    out = lj.lift(lambda v, x: x @ v["w"][:, 2:5])(adapter.bind(variables, delta), x)
    close(out, x @ adapter.merge(variables, delta)["w"][:, 2:5], 1e-5)


def test_no_lapack():
    """LAPACK calls of many sites, run side by side, wait for one another for ever where the pool has few threads."""
    q = jnp.zeros((3, 6))
    whole = jax.jit(jax.value_and_grad(lambda q: jnp.sum(rotation_less_identity(q, 4) ** 2)))
    assert "lapack" not in whole.lower(q).as_text()


def test_the_inverse_and_its_derivatives():
    skew = 3 * np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    a = np.eye(32, dtype=np.float32) - (skew - skew.swapaxes(-1, -2))
    np.testing.assert_allclose(inverse(jnp.asarray(a)), np.linalg.inv(a.astype(np.float64)), atol=2e-6)
    small = jnp.asarray(a[0, 0, :4, :4])
    # Through a gradient too, since LAPACK's own derivative is at hand as an oracle.
    for order in (jax.grad, lambda f: jax.grad(lambda a: jnp.sum(jax.grad(f)(a) ** 2))):
        of = lambda f: order(lambda a: jnp.sum(jnp.sin(f(a))))(small)  # noqa: B023, E731
        np.testing.assert_allclose(of(inverse), of(jnp.linalg.inv), atol=1e-5)
