"""A scanned stack whose lower layers carry nothing: the scan is split there, and the backward pass stops at it."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj

LAYERS = 5


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.Dense(x.shape[-1])(nn.tanh(x))
        return x, x.sum()


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scanned()(x, None)


def setup(layers):
    x = jax.random.normal(jax.random.key(0), (2, 8))
    variables = Stack().init(jax.random.key(1), x)
    adapter = lj.lora(2, 4, layers=layers)
    delta = adapter.init(jax.random.key(2), variables, lj.find_sites(Stack().apply, variables, x))
    delta = {p: dataclasses.replace(one, b=jnp.ones_like(one.b) * 0.3) for p, one in delta.items()}
    weigh = lambda outs: outs[0].sum() + (outs[1] * jnp.arange(1.0, LAYERS + 1)).sum()  # noqa: E731
    apply = lj.lift(Stack().apply)
    lifted = lambda d: weigh(apply(adapter.bind(variables, d), x))  # noqa: E731
    merged = lambda d: weigh(Stack().apply(adapter.merge(variables, d), x))  # noqa: E731
    return delta, lifted, merged


@pytest.mark.parametrize(
    "layers, lengths", [("all", [5, 5]), ("last:2", [3, 2, 2]), ([3], [3, 2, 2]), ("first:1", [5, 5])]
)
def test_the_backward_pass_stops_at_the_lowest_adapted_layer(layers, lengths):
    delta, lifted, _ = setup(layers)
    program = str(jax.make_jaxpr(jax.grad(lifted))(delta))
    assert [int(n) for n in re.findall(r"\blength=(\d+)", program)] == lengths


@pytest.mark.parametrize("layers", ["all", "last:2", [3], "first:1"])
def test_the_split_changes_no_value(layers):
    delta, lifted, merged = setup(layers)
    assert jnp.allclose(lifted(delta), merged(delta), rtol=1e-5)
    ours, theirs = jax.grad(lifted)(delta), jax.grad(merged)(delta)
    for a, b in zip(jax.tree_util.tree_leaves(ours), jax.tree_util.tree_leaves(theirs), strict=True):
        assert jnp.allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
