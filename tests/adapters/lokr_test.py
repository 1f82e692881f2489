"""What lokr promises beyond the conformance suite: the formula by hand, shapes, splits, counts, messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.lokr import factorization
from tests.adapters import kinds
from tests.adapters.lora_test import site, start
from tests.lift.checks import close, noisy


def matrix(one, i):
    """w1 or w2, whole or from its factors."""
    whole, a, b = (getattr(one, name + i) for name in "wab")
    return np.asarray(a @ b if whole is None else whole)


@pytest.mark.parametrize("options", [{}, {"rank": 1, "decompose_factor": 8, "decompose_both": True}])
@pytest.mark.parametrize(("kind", "path"), [("heads out", "in_0/kernel"), ("heads in", "back_1/kernel")])
def test_merged_weight_by_hand(kind, path, options):
    """W + alpha / r * kron(w1, w2) of the flattened axes."""
    kind = dataclasses.replace(kinds.get(kind), weights=path)
    adapter = kinds.make("lokr", kind, **options)
    delta = noisy(jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, kind.sites), kind.variables))
    one, base = delta[path], kind.variables["params"]
    merged = adapter.merge(kind.variables, delta)["params"]
    for key in path.split("/"):
        base, merged = base[key], merged[key]
    assert (one.w1 is None) == bool(options)
    update = 4 / (options.get("rank") or 2) * np.kron(matrix(one, "1"), matrix(one, "2"))
    np.testing.assert_allclose(merged, base + update.reshape(base.shape), rtol=1e-5, atol=1e-6)


def test_convolution_by_hand():
    """The Kronecker product is over the channels, and w2 holds the window."""
    where = site("w", (3, 2, 6, 10), uses=("conv",), fan_in=(0, 1, 2), fan_out=(3,))
    adapter = lj.lokr(3, alpha=6)
    delta = noisy(start(adapter, where))
    one = delta["w"]
    assert one.w1.shape == (2, 2) and one.w2.shape == (3 * 2 * 3, 5)
    merged = np.asarray(adapter.merge({"w": jnp.zeros(where.shape)}, delta)["w"])
    w2 = np.asarray(one.w2).reshape(3, 2, 3, 5)
    for place in np.ndindex(3, 2):
        np.testing.assert_allclose(merged[place], 2 * np.kron(one.w1, w2[place]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(30, 56), (56, 30)])
@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 1, "decompose_factor": 14, "decompose_both": True}])
def test_product_either_way(shape, options):
    """x W and x W^T, no size like another, so that no axis can be taken for another one."""
    adapter = lj.lokr(**options)
    delta = noisy(start(adapter, site("w", shape)))
    rng = np.random.default_rng(0)
    variables = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    for i, function in enumerate((lambda v, x: x @ v["w"], lambda v, x: x @ v["w"].T)):
        x = jnp.asarray(rng.normal(size=(3, shape[i])), jnp.float32)
        out = lj.lift(function)(adapter.bind(variables, delta), x)
        close(out, function(adapter.merge(variables, delta), x), 1e-5)
        assert np.abs(out - function(variables, x)).max() > 1e-2


def test_the_update_is_never_formed():
    """No array of the size of the weight appears beside the weight."""
    adapter, size = lj.lokr(2), 64
    delta = noisy(start(adapter, site("w", (size, size))))
    apply = lj.lift(lambda v, x: x @ v["w"])
    variables, x = {"w": jnp.ones((size, size))}, jnp.ones((2, size))
    grad = jax.grad(lambda d: jnp.sum(apply(adapter.bind(variables, d), x) ** 2))
    text = str(jax.make_jaxpr(grad)(delta))
    assert "64,64" in text and "8,8,8,8" not in text
    assert text.count("64,64]") <= 6, "the weight itself, passed on"


def test_factorization():
    """By hand, and against its definition for every width: m divides, m <= n, no divisor between m and the bound."""
    assert [factorization(256), factorization(128), factorization(127)] == [(16, 16), (8, 16), (1, 127)]
    assert [factorization(128, 4), factorization(128, 64), factorization(12, 5), factorization(50, 7)] == [
        (4, 32), (64, 2), (3, 4), (5, 10)
    ]  # fmt: skip


@pytest.mark.peers
def test_factorization_is_pefts():
    peft = pytest.importorskip("peft.tuners.lokr.layer")
    for width in (1, 2, 7, 12, 30, 36, 50, 64, 97, 100, 144, 768):
        for factor in (-1, 1, 2, 3, 5, 7, 8, 10, 11, 13, 20, 48, 100, 1000):
            assert factorization(width, factor) == peft.factorization(width, factor), (width, factor)


def test_number_of_parameters():
    """30 = 5 * 6, 56 = 7 * 8: whole, w2 split (rank below 8 / 2); with factor 14, 56 = 14 * 4 and both are split."""
    count = lambda **o: sum(x.size for x in jax.tree_util.tree_leaves(start(lj.lokr(**o), site("w", (30, 56)))))  # noqa: E731
    assert count(rank=4) == 5 * 7 + 6 * 8
    assert count(rank=3) == 5 * 7 + 3 * (6 + 8)
    assert count(rank=1, decompose_factor=14, decompose_both=True) == (5 + 14) + (6 + 4)


def test_a_high_rank_only_scales():
    low, high = (start(lj.lokr(r), site("w", (30, 56)))["w"] for r in (4, 400))
    assert low.w2.shape == high.w2.shape and (low.scales, high.scales) == ((2.0,), (0.02,))


def test_first_values():
    where = site("w", (900, 400))
    one = start(lj.lokr(2), where)["w"]
    assert not np.any(one.w1) and np.any(one.b2) and 0.15 < np.abs(one.a2).max() <= 1 / np.sqrt(30)
    one = start(lj.lokr(2, init="lycoris"), where)["w"]
    assert np.any(one.w1) and np.any(one.b2) and not np.any(one.a2)
    one = start(lj.lokr(20, init="lycoris"), where)["w"]
    assert np.any(one.w1) and not np.any(one.w2)
    one = start(lj.lokr(2, decompose_both=True), where)["w"]
    assert np.any(one.a1) and not np.any(one.b1)


def test_layers_of_a_stack():
    where = site("w", (3, 30, 56), batch=(0,), layer_axis=0)
    adapter = lj.lokr([("w#0", 0), ("w#1", 1), (".*", 3)], init="lycoris")
    delta = start(adapter, where)
    one = delta["w"]
    assert one.ranks == (0, 1, 3) and not np.any(one.w1[0]) and not np.any(one.b2[0])
    assert np.any(one.w1[1]) and not np.any(one.b2[1, 1:]) and np.all(np.any(one.b2[2], axis=-1))
    trainable = lj.audit(adapter, delta, {"w": jnp.zeros(where.shape)}, {"w": where}).trainable
    assert trainable == 2 * 5 * 7 + (1 + 3) * (6 + 8)
    with pytest.raises(lj.UserError, match=r"layers with ranks \[3, 4\].*below 4 split w2"):
        start(lj.lokr([("w#0", 3), (".*", 4)]), where)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decompose_factor": 0}, "lokr: decompose_factor=0: expected -1 or an integer of at least 1"),
        ({"decompose_factor": 2.0}, "decompose_factor=2.0"),
        ({"init": "lycoriss"}, "lokr: init='lycoriss' is unknown; did you mean 'lycoris'?"),
        ({"decompose_both": "yes"}, "lokr: decompose_both='yes' is unknown"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(lj.UserError) as caught:
        lj.lokr(**options)
    assert message in str(caught.value)
