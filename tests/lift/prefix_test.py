"""A function split at the frontier of an adapter: the parts are the whole, and the suffix computes nothing twice."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import noisy, variables_of

import lora_jax as lj
from lora_jax import trees
from lora_jax.lift import is_random, lift, split
from lora_jax.lift.min_cut import min_cut
from lora_jax.models import base as models

B, T, D = 3, 5, 8
FLOPS = 2 * B * T * D  # of a product with a vector of D outputs, per output


class Loop(nn.Module):
    """Pre-norm residual layers with dropout, and a head on the mean."""

    dropout: float = 0.0
    layers: int = 4

    @nn.compact
    def __call__(self, x, deterministic=True):
        for i in range(self.layers):
            h = nn.LayerNorm(name=f"norm_{i}")(x)
            h = nn.gelu(nn.Dense(4 * D, name=f"up_{i}")(h))
            h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
            x = x + nn.Dense(D, name=f"down_{i}")(h)
        return nn.Dense(3, name="head")(x.mean(1))


def loop(dropout=0.0):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    model = Loop(dropout)
    return lambda v, x: model.apply(v, x), variables_of(model, x), x


def paths(variables, pattern):
    return [p for p in trees.flatten(variables) if trees.matches(pattern, p)]


def flops(function, *args, **kwargs):
    return jax.jit(function).lower(*args, **kwargs).compile().cost_analysis()["flops"]


def changed(variables, chosen):
    return trees.replace(variables, {p: trees.flatten(variables)[p] + 0.5 for p in chosen})


@pytest.mark.parametrize(
    ("pattern", "shapes"),
    [
        ("up_2/kernel", [(B, T, D)]),  # the norm before it is made again from the residual stream
        ("down_2/kernel", [(B, T, 4 * D), (B, T, D)]),
        ("head/kernel", [(B, D)]),  # feature-based fine-tuning: the pooled features alone
        ("(up_1|down_3)/.*", [(B, T, D)]),
    ],
)
def test_the_parts_are_the_whole(pattern, shapes):
    function, variables, x = loop()
    chosen = paths(variables, pattern)
    parts = split(function, variables, chosen, x=x)
    assert sorted(s.shape for s in parts.frontier) == sorted(shapes)
    frontier = parts.prefix(variables, x=x)
    assert [f.shape for f in frontier] == [s.shape for s in parts.frontier]
    np.testing.assert_allclose(parts.suffix(variables, frontier, x=x), function(variables, x), rtol=1e-6, atol=1e-6)
    # Another value of an adapted weight reaches the output through the suffix alone, and never changes the prefix.
    moved = changed(variables, chosen)
    again = parts.prefix(moved, x=x)
    assert all(np.array_equal(a, b) for a, b in zip(again, frontier, strict=True))
    out = parts.suffix(moved, frontier, x=x)
    np.testing.assert_allclose(out, function(moved, x), rtol=1e-5, atol=1e-5)
    assert np.abs(out - function(variables, x)).max() > 1e-3


def test_the_suffix_computes_no_cold_product():
    function, variables, x = loop()
    parts = split(function, variables, ["up_3/kernel"], x=x)
    whole = flops(function, variables, x)
    suffix = flops(parts.suffix, variables, parts.frontier, x=x)
    layer = 2 * 4 * D * FLOPS
    head = 2 * B * D * 3
    assert layer + head <= suffix <= 1.5 * (layer + head) < whole / 2
    assert parts.share == pytest.approx(3 * layer / (4 * layer + head))
    # Nothing of the frozen part is read, so a weight of it may be anything.
    broken = changed(variables, paths(variables, ".*_[012]/.*"))
    frontier = parts.prefix(variables, x=x)
    assert np.array_equal(parts.suffix(broken, frontier, x=x), parts.suffix(variables, frontier, x=x))


def test_lift_takes_the_suffix():
    function, variables, x = loop()
    adapter = lj.lora(2, 4, targets=r"(up|down)_3/kernel")
    sites = lj.find_sites(function, variables, x)
    delta = noisy(adapter.init(jax.random.key(0), variables, sites))
    parts = split(function, variables, list(delta), x=x)
    frontier = parts.prefix(variables, x=x)

    def through(apply, *given, **inputs):
        return jax.grad(lambda d: jnp.sum(jnp.sin(apply(adapter.bind(variables, d), *given, **inputs))))(delta)

    cached, plain = through(lift(parts.suffix), frontier, x=x), through(lift(function), x=x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), cached, plain)


def test_other_batch_sizes_and_lengths():
    function, variables, x = loop()
    parts = split(function, variables, ["up_2/kernel"], x=jax.ShapeDtypeStruct((2, 7, D), x.dtype))
    out = parts.suffix(variables, parts.prefix(variables, x=x), x=x)
    np.testing.assert_allclose(out, function(variables, x), rtol=1e-6, atol=1e-6)
    with pytest.raises(lj.UserError, match=r"shape \(3, 5, 8\).*need \(2, 5, 8\)"):
        parts.suffix(variables, parts.prefix(variables, x=x), x=x[:2])


def test_nothing_to_keep():
    function, variables, x = loop()
    assert split(function, variables, ["up_0/kernel", "head/bias"], x=x) is None
    with pytest.raises(lj.UserError, match="no weight 'up_9/kernel'"):
        split(function, variables, ["up_9/kernel"], x=x)
    with pytest.raises(lj.UserError, match=r"leading sizes \[3, 8\]"):
        split(lambda v, x, y: function(v, x) + y.sum(), variables, ["head/bias"], x=x, y=x[0, 0])


def test_dropout_is_never_kept():
    """With dropout in the first layer nothing below the head is the same twice; at a rate of 0 nothing is drawn."""
    for rate in (0.0, 0.5):
        model = Loop(rate)
        _, variables, x = loop()
        function = lambda v, x, key, m=model: m.apply(v, x, False, rngs={"dropout": key})  # noqa: E731
        for key in (jax.random.key(0), jax.random.PRNGKey(0)):  # typed and raw
            wrapped = lambda v, x, k=key, f=function: f(v, x, k)  # noqa: E731
            assert is_random(wrapped, variables, x=x) == (rate > 0)
            parts = split(wrapped, variables, ["head/kernel"], x=x)
            assert sorted(s.shape for s in parts.frontier) == [(B, D)] if rate == 0 else parts.share < 0.3


class Jitted(nn.Module):
    """Layers inside jitted calls, and a scanned stack above them."""

    @nn.compact
    def __call__(self, x):
        x = nn.jit(nn.Dense)(D, name="low")(x)
        x = nn.remat(nn.Dense)(D, name="kept")(nn.relu(x))
        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(name="stack")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(D, name="dense")(nn.tanh(x)), None


def test_jitted_calls_are_opened_and_a_scan_is_hot_as_a_whole():
    model = Jitted()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    variables = variables_of(model, x)
    function = jax.jit(lambda v, x: model.apply(v, x))
    product = T * D * 2 * B * D
    for path, share in (("kept/kernel", 1 / 5), ("stack/dense/kernel", 2 / 5)):
        parts = split(function, variables, [path], x=x)
        assert parts.share == pytest.approx(share)
        out = parts.suffix(variables, parts.prefix(variables, x=x), x=x)
        np.testing.assert_allclose(out, function(variables, x), rtol=1e-6, atol=1e-6)
        if path.startswith("kept"):
            assert flops(parts.prefix, variables, x=x) < 1.5 * product


BERT = dict(
    model_type="bert", vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
    max_position_embeddings=32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
)  # fmt: skip
LLAMA = dict(
    model_type="llama", vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, rms_norm_eps=1e-5,
)  # fmt: skip


@pytest.mark.parametrize(("config", "labels"), [(BERT, 2), (LLAMA, None)], ids=["bert", "llama"])
def test_our_families(config, labels):
    base = models.from_config(config, num_labels=labels)
    variables = noisy(base.variables)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 30, (B, T)), jnp.int32)
    inputs = {"tokens": tokens, "attention_mask": jnp.arange(T)[None] < jnp.array([[5], [3], [4]])}
    adapter = lj.lora(2, 4, targets="q,v", layers="last:2")
    delta = noisy(adapter.init(jax.random.key(0), variables, base.sites))
    parts = split(base.apply, variables, list(delta), **inputs)
    # The input of the third layer, and its keys, which no adapter changes.
    assert parts.frontier[0].shape == (B, T, D) and len(parts.frontier) == 2
    assert 0.4 < parts.share < 0.65
    bound = adapter.bind(variables, delta)
    expected = lift(base.apply)(bound, **inputs)
    out = lift(parts.suffix)(bound, parts.prefix(variables, **inputs), **inputs)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    whole, rest = flops(base.apply, variables, **inputs), flops(parts.suffix, variables, parts.frontier, **inputs)
    assert rest < (1.1 - parts.share) * whole
    assert is_random(base.apply, variables, **inputs, dropout_key=jax.random.key(0)) == (config is BERT)


def test_quantized_bases_have_a_prefix():
    base = models.quantized(models.from_config({**LLAMA, "hidden_size": 16, "head_dim": 8}), "nf4")
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 30, (B, T)), jnp.int32)
    adapter = lj.lora(2, 4, targets="q", layers="last:1")
    delta = noisy(adapter.init(jax.random.key(0), base.variables, base.sites))
    parts = split(base.apply, base.variables, list(delta), tokens=tokens)
    frontier = lift(parts.prefix, unused="allow")(base.variables, tokens=tokens)
    bound = adapter.bind(base.variables, delta)
    out = lift(parts.suffix)(bound, frontier, tokens=tokens)
    np.testing.assert_allclose(out, lift(base.apply)(bound, tokens=tokens), rtol=1e-5, atol=1e-5)


def test_the_smallest_cut():
    sizes = {1: 5.0, 2: 2.0, 3: 2.0, 4: 3.0, 5: 3.0, 6: 4.0}
    made = {2: [1], 3: [1], 4: [2], 5: [3], 6: [4, 5]}
    assert min_cut({1}, {4, 5}, made, sizes.__getitem__) == (2, 3)  # before the larger ones
    assert min_cut({1}, {4, 6}, made, sizes.__getitem__) == (2, 3)
    assert min_cut({1}, {6}, made, sizes.__getitem__) == (6,)  # equal to 2 and 3 together, and nearer to the end
    assert min_cut({1}, {1, 4}, made, sizes.__getitem__) == (1,)
    assert min_cut({1}, {4}, made, lambda i: float("inf")) is None
