"""What lora promises beyond the conformance suite: the formula by hand, ranks as prefixes, rules, messages."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.sites import Site
from tests.adapters import kinds
from tests.lift.checks import bits_equal, close, loss, noisy, weights

PATH = "layers_0/kernel"


def site(path, shape, **fields):
    """A site without a model."""
    fields = {"fan_in": (len(shape) - 2,), "fan_out": (len(shape) - 1,), "uses": ("linear",)} | fields
    return Site(path=path, shape=shape, dtype=np.dtype("float32"), **fields)


def start(adapter, *sites, seed=0):
    """The first delta of an adapter on given sites."""
    variables = {s.path: jnp.zeros(s.shape) for s in sites}
    return adapter.init(jax.random.key(seed), variables, {s.path: s for s in sites})


@pytest.mark.parametrize(
    ("kind", "path", "equation"),
    [
        ("heads out", "in_0/kernel", "dr,rhk->dhk"),
        ("heads in", "back_1/kernel", "hkr,rd->hkd"),
        ("all sizes equal", "in_0/kernel", "dr,rhk->dhk"),
        ("all sizes equal", "back_1/kernel", "hkr,rd->hkd"),
        ("conv", PATH, "xyir,ro->xyio"),
        ("scan", "layers/dense/kernel", "lir,lro->lio"),
        ("experts", "layers_0/down", "efr,erd->efd"),
        ("tied embedding", "layers_0/embedding", "vr,rd->vd"),
    ],
)
def test_merged_weight_by_hand(kind, path, equation):
    """W + alpha / r * A B with the axes where they belong; with all sizes equal nothing but the axes can tell."""
    kind = kinds.get(kind)
    adapter = kinds.make("lora", dataclasses.replace(kind, weights=path))
    variables = kind.variables.get("params", kind.variables)
    delta = noisy(jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, kind.sites), kind.variables))
    merged = adapter.merge(kind.variables, delta)
    merged = merged.get("params", merged)
    for key in path.split("/"):
        variables, merged = variables[key], merged[key]
    one = delta[path]
    expected = np.asarray(variables) + 4 / 2 * np.einsum(equation, one.a, one.b)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


def test_scalings():
    x, w = weights(5, 6), weights(6, 4)
    sites = lj.find_sites(lambda v, x: x @ v["w"], {"w": w}, x)
    for scaling, expected in (("alpha/r", 3 / 4), ("alpha/sqrt(r)", 3 / 2), ("alpha", 3.0)):
        adapter = lj.lora(rank=4, alpha=3, scaling=scaling)
        delta = noisy(adapter.init(jax.random.key(0), {"w": w}, sites))
        assert delta["w"].scales == (expected,)
        update = adapter.merge({"w": w}, delta)["w"] - w
        np.testing.assert_allclose(update, expected * delta["w"].a @ delta["w"].b, rtol=1e-4, atol=1e-6)


def test_scale_may_be_data():
    kind = kinds.get("scan")
    adapter = kinds.make("lora", kind)
    delta = noisy(jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, kind.sites), kind.variables))
    path = next(iter(delta))
    apply = jax.jit(lambda scale: lj.lift(kind.function)(adapter.bind(kind.variables, delta, scale=scale), *kind.args))
    usual = lj.lift(kind.function)(adapter.bind(kind.variables, delta), *kind.args)
    close(apply(2.0), usual, 1e-6)
    close(apply({path: jnp.array([2.0, 2.0])}), usual, 1e-6)
    close(apply(0.0), jax.jit(kind.function)(kind.variables, *kind.args), 1e-6)
    half = {path: dataclasses.replace(delta[path], b=delta[path].b * jnp.array([1.0, 0.5])[:, None, None])}
    by_layer = lj.lift(kind.function)(adapter.bind(kind.variables, half), *kind.args)
    close(apply({path: jnp.array([2.0, 1.0])}), by_layer, 1e-5)


def test_dropout_keeps_the_mean_and_leaves_the_base_alone():
    x, w = jnp.ones((64, 6)), weights(6, 4)
    apply = lambda v, x: x @ v["w"]  # noqa: E731
    adapter = lj.lora(rank=2, dropout=0.4)
    delta = noisy(jax.eval_shape(lambda: start(adapter, site("w", (6, 4)))))
    run = jax.jit(jax.vmap(lambda key: lj.lift(apply)(adapter.bind({"w": w}, delta, key=key), x)))
    outs = run(jax.random.split(jax.random.key(0), 256)) - (x @ w)[None]
    update = x[0] @ (adapter.merge({"w": w}, delta)["w"] - w)
    np.testing.assert_allclose(outs.mean((0, 1)), update, atol=0.03 * np.abs(update).max())
    kept = (np.abs(outs).max(-1) > 0).mean()
    assert kept > 0.99, "an activation's entries are dropped one by one, not all at once"


def test_only_b_has_a_gradient_at_first():
    kind = kinds.get("dense")
    adapter = kinds.make("lora", kind)
    delta = adapter.init(jax.random.key(0), kind.variables, kind.sites)
    apply = lj.lift(kind.function)
    grads = jax.grad(lambda d: loss(apply(adapter.bind(kind.variables, d), *kind.args)))(delta)
    for one in grads.values():
        assert not np.any(one.a) and np.any(one.b)


def test_merge_and_subtract_restores_the_weight():
    kind = kinds.get("dense")
    adapter = kinds.make("lora", kind)
    delta = noisy(adapter.init(jax.random.key(0), kind.variables, kind.sites))
    minus = {p: dataclasses.replace(one, b=-one.b) for p, one in delta.items()}
    close(adapter.merge(adapter.merge(kind.variables, delta), minus), kind.variables, 1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_a_smaller_rank_is_a_prefix(jit):
    """Bit for bit, jitted or not: arms of an ablation over ranks start from the same columns."""
    where = site("w", (3, 8, 6), batch=(0,), layer_axis=0)

    def draw(rank):
        init = lambda: start(lj.lora(rank=rank), where)["w"].a  # noqa: E731
        return jax.jit(init)() if jit else init()

    whole = start(lj.lora(rank=5), where)["w"].a
    assert np.unique(whole).size > 0.99 * whole.size, "every layer and every column has a draw of its own"
    for rank in (1, 4):
        np.testing.assert_array_equal(draw(rank), whole[..., :rank])


def test_first_values():
    """A uniform within 1/sqrt(fan_in), B zero; Gaussian with standard deviation 1/rank; or A zero."""
    where = site("w", (100, 80))
    one = start(lj.lora(rank=16), where)["w"]
    assert 0.09 < np.abs(one.a).max() <= 0.1 and not np.any(one.b) and abs(float(one.a.mean())) < 0.01
    np.testing.assert_allclose(np.std(one.a), 0.1 / math.sqrt(3), rtol=0.05)
    one = start(lj.lora(rank=16, init="gaussian"), where)["w"]
    np.testing.assert_allclose(np.std(one.a), 1 / 16, rtol=0.05)
    assert not np.any(one.b)
    one = start(lj.lora(rank=16, init="a_zero"), where)["w"]
    assert not np.any(one.a) and 0.1 < np.abs(one.b).max() <= 1 / math.sqrt(80)
    one = start(lj.lora(rank=16, targets="w"), site("w", (100, 80), uses=("embedding",)))["w"]
    assert not np.any(one.a) and np.std(one.b) > 0.9, "as PEFT: a row that is looked up trains at once"
    stack = start(
        lj.lora(rank=[("w#0", 2), (".*", 8)], init="gaussian"), site("w", (2, 200, 20), batch=(0,), layer_axis=0)
    )
    np.testing.assert_allclose([np.std(stack["w"].a[0, :, :2]), np.std(stack["w"].a[1])], [1 / 2, 1 / 8], rtol=0.1)


def test_keys_and_paths_decide_the_draw():
    first, other = site("a", (8, 6)), site("b", (8, 6))
    both = start(lj.lora(rank=2), first, other)
    assert np.any(both["a"].a != both["b"].a)
    bits_equal(start(lj.lora(rank=2), other)["b"].a, both["b"].a)
    assert np.any(start(lj.lora(rank=2), first, seed=1)["a"].a != both["a"].a)


def test_ranks_by_rule_and_layer():
    sites = [site(f"layers_{i}/{n}/kernel", (8, 6), layer=i) for i in range(3) for n in ("q", "k")]
    delta = start(
        lj.lora(rank=[(".*/q/.*", 4), ("layers_2/.*", 0), (".*", 1)], alpha=[(".*/k/.*", 2), (".*", 8)]), *sites
    )
    assert {p: (one.ranks, one.scales) for p, one in delta.items()} == {
        **{f"layers_{i}/q/kernel": ((4,), (2.0,)) for i in range(3)},
        **{f"layers_{i}/k/kernel": ((1,), (2.0,)) for i in range(2)},
    }
    stack = site("layers/kernel", (3, 8, 6), batch=(0,), layer_axis=0)
    one = start(lj.lora(rank={"layers/kernel#1": 4, ".*": 2}, alpha=8, layers=[1, 2]), stack)["layers/kernel"]
    assert one.ranks == (0, 4, 2) and one.scales == (0.0, 2.0, 4.0)
    assert not np.any(one.a[0]) and not np.any(one.a[2, :, 2:]) and np.all(np.any(one.a[1], axis=0))


def test_number_of_parameters():
    delta = start(lj.lora(rank=3), site("w", (2, 8, 3, 5), batch=(0,), fan_in=(1,), fan_out=(2, 3)))
    assert sum(x.size for x in jax.tree_util.tree_leaves(delta)) == 2 * 3 * (8 + 15)


def test_default_targets():
    sites = [
        site("dense", (8, 6)),
        site("conv", (3, 3, 8, 6), uses=("conv",), fan_in=(0, 1, 2), fan_out=(3,)),
        site("embedding", (9, 8), uses=("embedding",)),
        site("tied", (9, 8), uses=("linear", "embedding")),
        site("score", (8, 6), role="head"),
        site("norm", (8,), uses=("elementwise",), fan_in=(), fan_out=()),
        site("idle", (8, 6), uses=(), fan_in=(), fan_out=()),
    ]
    assert set(jax.eval_shape(lambda: start(lj.lora(rank=2), *sites))) == {"dense", "conv"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 is 0 at every selected site, so nothing would train; give a rank of at least 1"),
        ({"rank": [(".*", 0)]}, "is 0 at every selected site"),
        ({"rank": 7}, "rank 7 is above min(fan_in, fan_out) = 6 of 'layers_0/up/kernel' with shape (8, 6)"),
        ({"rank": -1}, "rank must be an integer of at least 0 (a rule may give it by pattern), got -1"),
        ({"rank": 2.0}, "got 2.0 for 'layers_0/up/kernel'"),
        ({"rank": True}, "got True for 'layers_0/up/kernel'"),
        ({"rank": "high"}, "rank must be a number or a list of (pattern, number) rules, got 'high'"),
        ({"rank": [("nothing", 2), (".*", 1)]}, "the rank rule 'nothing' matches none of the 2 selected sites"),
        ({"rank": [("layers_0/.*", 2)]}, "no rank rule covers 'layers_1/up/kernel'; end the list with ('.*', value)"),
        ({"rank": [("(", 2)]}, "the pattern '(' is not a regular expression"),
        ({"rank": [2, 3]}, "a rank rule is a (pattern, number) pair, got 2"),
        ({"alpha": "much"}, "alpha must be a number or a list of (pattern, number) rules, got 'much'"),
        ({"alpha": [(".*", "much")]}, "alpha must be a number or (pattern, number) rules, got 'much'"),
        ({"alpha": True}, "got True"),
        ({"targets": "layers_0/bias"}, "'layers_0/bias' of shape (6,) is not one. Narrow the targets"),
        ({"targets": ".*/upp/kernel"}, "Nearest paths: layers_1/up/kernel, layers_0/up/kernel"),
        ({"targets": []}, "targets=[] holds no pattern"),
        ({"targets": " , "}, "targets=' , ' holds no pattern"),
        ({"layers": "last:3"}, "layers='last:3', but the model has 2 layers; k must be 1 to 2"),
    ],
)
def test_mistakes_at_init(options, message):
    sites = [site(f"layers_{i}/up/kernel", (8, 6), layer=i) for i in range(2)]
    sites.append(site("layers_0/bias", (6,), fan_in=(), fan_out=(), uses=("bias",), layer=0))
    with pytest.raises(lj.UserError) as caught:
        start(lj.lora(**{"rank": 4} | options), *sites)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.5}, "dropout=1.5: expected 0 <= dropout < 1"),
        ({"dropout": 1.0}, "dropout=1.0: expected 0 <= dropout < 1 (at 1 nothing would reach"),
        ({"scaling": "alpha/rr"}, "lora: scaling='alpha/rr' is unknown; did you mean 'alpha/r'?"),
        (
            {"init": "gauss"},
            "lora: init='gauss' is unknown; did you mean 'gaussian'? (known: a_zero, default",
        ),
    ],
)
def test_mistakes_at_once(options, message):
    with pytest.raises(lj.UserError) as caught:
        lj.lora(**options)
    assert message in str(caught.value)


def test_unknown_methods_and_options():
    with pytest.raises(lj.UserError, match=r"there is no method 'lorra'; did you mean 'lora'\? \(known: adalora"):
        lj.adapters.get("lorra")
    with pytest.raises(lj.UserError, match="method 'lora' has no option 'ranks'; did you mean 'rank'"):
        lj.from_spec({"method": "lora", "ranks": 2})
    with pytest.raises(lj.UserError, match=r"needs the field 'method', got \['rank'\]"):
        lj.from_spec({"rank": 2})
    with pytest.raises(AttributeError, match="no attribute 'lorra'"):
        _ = lj.lorra


def test_head_and_layers_need_one():
    sites = {"w": site("w", (8, 6))}
    with pytest.raises(lj.UserError, match="the method 'head' finds no head.*targets='.*head.*'"):
        lj.head().init(jax.random.key(0), {"w": jnp.zeros((8, 6))}, sites)
    with pytest.raises(lj.UserError, match="'layers' needs weights with a layer index"):
        lj.adapters.get("layers")().init(jax.random.key(0), {"w": jnp.zeros((8, 6))}, sites)
    sites = {"score/kernel": site("score/kernel", (8, 6), role="head", bias="score/bias")}
    sites["score/bias"] = site("score/bias", (6,), fan_in=(), fan_out=(), uses=("bias",))
    variables = {"score/kernel": jnp.zeros((8, 6)), "score/bias": jnp.zeros(6)}
    assert set(lj.head().init(jax.random.key(0), variables, sites)) == set(variables)
