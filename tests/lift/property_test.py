"""Random small networks: whatever is composed, the axes are found and lifted == merged.

A network is a list of layers, each from (size of its input, random choices) to a weight's shape, the axes that its use
gives the weight, and the function of (weight, activation). Activations are (batch, time, size).
"""

import string

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from tests.lift.checks import biases, check, weights

SIZES = st.integers(2, 5)


@st.composite
def einsum_layer(draw, size):
    """A product over the last axis or the two it is split into; the axes of weight and output in any order."""
    split = [(a, size // a) for a in range(2, size) if size % a == 0]
    in_sizes = draw(st.sampled_from([(size,), *split]))
    out_sizes = draw(st.lists(SIZES, min_size=1, max_size=2))
    sizes = dict(zip("defg", (*in_sizes, *out_sizes)))
    w_letters = "".join(draw(st.permutations(sorted(sizes))))
    kept = [c for c in w_letters if c not in "defg"[: len(in_sizes)]]
    out_letters = "".join(draw(st.permutations(["a", "b", *kept])))
    equation = f"ab{'defg'[: len(in_sizes)]},{w_letters}->{out_letters}"
    if weight_first := draw(st.booleans()):
        equation = f"{w_letters},ab{'defg'[: len(in_sizes)]}->{out_letters}"

    def apply(w, x):
        x = x.reshape(*x.shape[:2], *in_sizes)
        y = jnp.einsum(equation, *((w, x) if weight_first else (x, w)))
        return jnp.einsum(f"{out_letters}->ab{''.join(sorted(kept))}", y).reshape(*x.shape[:2], -1)

    fan_in = tuple(i for i, c in enumerate(w_letters) if c not in kept)
    fan_out = tuple(i for i, c in enumerate(w_letters) if c in kept)
    return tuple(sizes[c] for c in w_letters), ((), fan_in, fan_out), apply


@st.composite
def dense_layer(draw, size):
    """A kernel stored as it is, transposed, with its outputs split, with its inputs split, or cut in two."""
    out, kind = (
        draw(SIZES),
        draw(st.sampled_from(["plain", "transposed", "outputs split", "inputs split", "cut", "flat"])),
    )
    if kind == "transposed":
        return (out, size), ((), (1,), (0,)), lambda w, x: x @ w.T
    if kind == "outputs split":
        return (size, 2, out), ((), (0,), (1, 2)), lambda w, x: x @ w.reshape(size, -1)
    if kind == "inputs split" and size % 2 == 0:
        found = ((), (0, 1), (2,)) if size > 2 else ((), (0,), (1, 2))  # an axis of size one that is merged is no input
        return (2, size // 2, out), found, lambda w, x: x @ w.reshape(size, out)
    if kind == "cut":
        cut = draw(st.integers(1, out))
        return (size, out + 1), ((), (0,), (1,)), lambda w, x: jnp.concatenate([x @ w[:, cut:], x @ w[:, :cut]], -1)
    if kind == "flat":
        flat = lambda w, x: (x.reshape(-1, size) @ w).reshape(*x.shape[:2], out)  # noqa: E731
        return (size, out), ((), (0,), (1,)), flat
    return (size, out), ((), (0,), (1,)), lambda w, x: x @ w


@st.composite
def stacked_layer(draw, size):
    """Square weights stacked along any axis, scanned, indexed or walked backwards; the stack may be one product too."""
    length, axis = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    how = draw(st.sampled_from(["scan", "reversed", "remat", "index", "traced index", "experts"]))
    shape = [size, size]
    shape.insert(axis, length)
    rest = [i for i in range(3) if i != axis]
    if how == "experts" and length > 1:

        def experts(w, x):
            letters = ["d", "f"]
            letters.insert(axis, "e")
            return jnp.tanh(jnp.einsum(f"abd,{''.join(letters)}->eabf", x, w)).sum(0)

        return tuple(shape), ((), (rest[0],), tuple(sorted((axis, rest[1])))), experts
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    if how == "remat":
        step = jax.checkpoint(step)

    def apply(w, x):
        w = jnp.moveaxis(w, axis, 0)
        if how == "index":
            for i in range(length):
                x, _ = step(x, w[i])
            return x
        if how == "traced index":
            return lax.fori_loop(0, length, lambda i, x: step(x, w[i])[0], x)
        return lax.scan(step, x, w, reverse=how == "reversed")[0]

    expected = ((axis,), (rest[0],), (rest[1],))
    if length == 1 and "index" in how:  # an axis of size one that is dropped is no stack
        expected = ((), (rest[0],), tuple(sorted((axis, rest[1]))))
    return tuple(shape), expected, apply


@st.composite
def networks(draw):
    """[(shape, axes, function, with a bias?, wrapped in what?)]; each layer's input is the one before's output."""
    size, layers = 4, []
    for _ in range(draw(st.integers(1, 3))):
        shape, axes, apply = draw(st.one_of(einsum_layer(size), dense_layer(size), stacked_layer(size)))
        wrapped = draw(st.sampled_from(["", "jit", "checkpoint", "cond"]))
        layers.append((shape, axes, apply, draw(st.booleans()), wrapped))
        x = jax.ShapeDtypeStruct((2, 3, size), jnp.float32)
        size = jax.eval_shape(apply, jax.ShapeDtypeStruct(shape, jnp.float32), x).shape[-1]
    return layers


def wrap(function, how):
    """The same function behind a construct that `lift` has to enter."""
    if how == "cond":
        return lambda w, x: lax.cond(jnp.sum(x) > 1e9, lambda w, x: 2 * function(w, x), function, w, x)
    return {"": lambda f: f, "jit": jax.jit, "checkpoint": jax.checkpoint}[how](function)


def run(layers):
    variables, expected = {}, {}
    x = weights(2, 3, 4) * 2
    for name, (shape, axes, _, biased, _) in zip(string.ascii_lowercase, layers):
        variables[name] = {"kernel": weights(*shape) * 1.5}
        expected[f"{name}/kernel"] = axes
        if biased:
            variables[name]["bias"] = jnp.full(1, 0.1)

    def apply(v, x):
        for name, (_, _, layer, biased, wrapped) in zip(string.ascii_lowercase, layers):
            x = wrap(layer, wrapped)(v[name]["kernel"], x)
            x = jnp.tanh(x + v[name]["bias"][0] if biased else x)
        return x

    _, _, sites = check(apply, variables, x, expect=expected, rank=1, rtol=1e-4, grad_rtol=1e-3)
    assert not biases(sites), "one number for all outputs is no bias"


@given(networks())
@settings(max_examples=7, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_lifted_equals_merged_on_random_networks(layers):
    run(layers)


@pytest.mark.slow
@given(networks())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_lifted_equals_merged_on_many_random_networks(layers):
    run(layers)
