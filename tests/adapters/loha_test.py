"""What loha promises beyond the conformance suite: the formula by hand, the update's rank, counts, first values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.lift.products import Dot
from tests.adapters import kinds
from tests.adapters.lora_test import site, start
from tests.lift.checks import close, noisy


@pytest.mark.parametrize(
    ("kind", "path", "first", "rest"),
    [
        ("heads out", "in_0/kernel", "dr,rhk->dhk", {}),
        ("heads in", "back_1/kernel", "hkr,rd->hkd", {}),
        ("conv", "layers_0/kernel", "xyir,ro->xyio", {}),
        ("scan", "layers/dense/kernel", "lir,lro->lio", {"rank": [("layers/dense/kernel#0", 1), (".*", 3)]}),
        ("tied embedding", "layers_0/embedding", "vr,rd->vd", {}),
    ],
)
def test_merged_weight_by_hand(kind, path, first, rest):
    """W + alpha / r * (A1 B1) * (A2 B2), each layer of a stack by its own rank."""
    kind = dataclasses.replace(kinds.get(kind), weights=path)
    adapter = kinds.make("loha", kind, **rest)
    delta = noisy(jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, kind.sites), kind.variables))
    one, base = delta[path], kind.variables["params"]
    merged = adapter.merge(kind.variables, delta)["params"]
    for key in path.split("/"):
        base, merged = base[key], merged[key]
    scale = np.reshape(one.scales, [-1] + [1] * (base.ndim - 1)) if rest else 4 / 2
    assert one.scales == ((4.0, 4 / 3) if rest else (2.0,))
    update = scale * np.einsum(first, one.a, one.b) * np.einsum(first, one.a2, one.b2)
    np.testing.assert_allclose(merged, base + update, rtol=1e-5, atol=1e-6)


def entry_at(shape, rank, **options):
    adapter = lj.loha(rank, **options)
    return adapter, noisy(start(adapter, site("w", shape)))


def test_the_rank_is_squared():
    """Proposition 1: the product of two rank-3 matrices has rank 9, at the parameters of one of rank 6."""
    adapter, delta = entry_at((14, 11), 3)
    update = adapter.merge({"w": jnp.zeros((14, 11))}, delta)["w"]
    assert np.linalg.matrix_rank(update) == 9
    assert sum(x.size for x in jax.tree_util.tree_leaves(delta)) == 2 * 3 * (14 + 11)


@pytest.mark.parametrize(("rank", "columns"), [(3, 9), (4, None)])
def test_product_by_columns_or_dense(rank, columns, monkeypatch):
    """r * r columns while they are fewer than min(fan_in, fan_out) = 11, else the dense update; the same result."""
    adapter, delta = entry_at((14, 11), rank)
    seen, factored = [], Dot.factored
    monkeypatch.setattr(
        Dot, "factored", lambda self, x, a, b, axes: seen.append(a.shape[-1]) or factored(self, x, a, b, axes)
    )
    variables, x = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(14, 11)), jnp.float32)}, jnp.ones((2, 14))
    out = lj.lift(lambda v, x: x @ v["w"])(adapter.bind(variables, delta), x)
    assert seen == ([] if columns is None else [columns])
    close(out, x @ adapter.merge(variables, delta)["w"], 1e-5)


def test_a_small_update_survives_a_bfloat16_weight():
    """In the dense form as in the other, the update is not rounded to the weight's grid."""
    adapter, delta = entry_at((8, 8), 4)
    small = jax.tree_util.tree_map(lambda x: 0.05 * x, delta)
    variables, x = {"w": jnp.full((8, 8), 100.0, jnp.bfloat16)}, jnp.ones((1, 8), jnp.bfloat16).at[0, ::2].set(-1)
    out = lj.lift(lambda v, x: x @ v["w"])(adapter.bind(variables, small), x)
    assert np.any(np.asarray(out, np.float32)), "x sums to zero, so the base gives zero"


def test_first_values():
    """As PEFT: 1/sqrt(fan_in) along fan_in, 1/sqrt(rank) along fan_out, the second factor of fan_in zero."""
    one = start(lj.loha(16), site("w", (100, 80)))["w"]
    assert 0.09 < np.abs(one.a).max() <= 0.1
    for b in (one.b, one.b2):
        np.testing.assert_allclose(np.std(b), 0.25 / math.sqrt(3), rtol=0.1)
    assert np.any(one.b != one.b2) and not np.any(one.a2)


def test_layers_of_a_stack_have_their_own_rank():
    where = site("w", (3, 8, 6), batch=(0,), layer_axis=0)
    adapter = lj.loha([("w#0", 0), ("w#1", 1), (".*", 2)])
    delta = start(adapter, where)
    one = delta["w"]
    assert one.ranks == (0, 1, 2) and one.scales == (0.0, 8.0, 4.0)
    for a, b in ((one.a, one.b), (one.a, one.b2)):
        assert not np.any(a[0]) and not np.any(b[0]) and not np.any(a[1, :, 1:]) and not np.any(b[1, 1:])
    assert lj.audit(adapter, delta, {"w": jnp.zeros((3, 8, 6))}, {"w": where}).trainable == 2 * 3 * (8 + 6)


def test_mistakes():
    with pytest.raises(lj.UserError, match=r"rank 7 is above min\(fan_in, fan_out\) = 6 of 'w'"):
        start(lj.loha(7), site("w", (8, 6)))
    with pytest.raises(lj.UserError, match="loha needs weights that a product uses; 'b' of shape"):
        start(lj.loha(2, targets="b"), site("b", (6,), fan_in=(), fan_out=(), uses=("bias",)))
