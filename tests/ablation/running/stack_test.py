"""Stacked deltas: what went in comes out, ranks by zeros, absent sites by another arm's start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin

import lora_jax as lj
from lora_jax.ablation.running import stack

BASE = standin.make_base()


def start(method, seed=0):
    delta = method.init(jax.random.key(seed), BASE.variables, BASE.sites)
    return jax.tree.map(lambda x: x + 0.5 if jnp.issubdtype(x.dtype, jnp.floating) else x, delta)


def test_each_arm_comes_out_as_it_went_in():
    methods = [lj.lora(rank=1, alpha=3), lj.lora(rank=4, alpha=8, targets=[min(start(lj.lora(rank=1)))])]
    deltas = [start(method, i) for i, method in enumerate(methods)]
    found = stack.stack(deltas)
    for i, delta in enumerate(deltas):
        own = stack.unstack(found.delta, i, delta)
        assert jax.tree.structure(own) == jax.tree.structure(delta)
        jax.tree.map(np.testing.assert_array_equal, own, delta)
    first = min(deltas[1])
    np.testing.assert_array_equal(found.delta[first].a[0, :, 1:], 0.0)
    np.testing.assert_array_equal(found.delta[first].b[0, 1:], 0.0)
    np.testing.assert_allclose(found.scales[first], [3.0, 2.0])
    for path, flags in found.present.items():
        assert flags.tolist() == [True, path == first]


def test_only_what_stacks_is_alike():
    lora, dora = start(lj.lora(rank=2)), start(lj.dora(rank=2))
    assert stack.alike(lora, start(lj.lora(rank=1)), fill=False)
    assert not stack.alike(lora, dora, fill=True)
    fewer = {path: one for i, (path, one) in enumerate(lora.items()) if i}
    assert stack.alike(lora, fewer, fill=True) and not stack.alike(lora, fewer, fill=False)
    vera = start(lj.vera(rank=2))
    assert not stack.alike(vera, start(lj.vera(rank=3)), fill=True), "its frozen factors are not zero beyond the rank"


@pytest.mark.parametrize(
    ("method", "expected"),
    [(lj.lora(), True), (lj.adalora(), False), (lj.lora(init="eva"), False), (lj.prompt(), False)],
)
def test_another_arms_start_fills_a_gap_only_where_it_does_nothing(method, expected):
    assert stack.fills(method) == expected
