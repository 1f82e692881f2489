"""Likelihoods of targets: those of plain autodiff, for fewer passes and without the logits of all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from experiments.benchmarks import measure
from lora_jax import likelihood, sharding
from lora_jax.errors import UserError
from lora_jax.likelihood import cross_entropy, of_product
from lora_jax.models import quantized
from lora_jax.recompute import between_products

MODEL = dict(
    model_type="llama", vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip


def test_cross_entropy_is_exact_and_stable():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 4, 7)), rng.integers(0, 7, (3, 4))
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(logits * 1e4, targets).min(), 0, atol=1e-6)
    assert np.isfinite(cross_entropy(logits * 1e4, targets)).all()
    half = cross_entropy(np.asarray(logits, np.float16), targets)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, expected, atol=5e-3)


def test_the_derivative_of_cross_entropy():
    """Against plain autodiff, with a factor of its own for every token; the dtype is that of the logits."""
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(rng.normal(size=(3, 4, 7)), jnp.float32), jnp.asarray(rng.integers(0, 7, (3, 4)))
    factors = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    plain = lambda z: -jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0]  # noqa: E731
    found = jax.grad(lambda z: jnp.sum(factors * cross_entropy(z, targets)))(logits)
    expected = jax.grad(lambda z: jnp.sum(factors * plain(z)))(logits)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    half = jax.grad(lambda z: jnp.sum(factors * cross_entropy(z, targets)))(logits.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.02)


def test_a_loss_passes_over_the_logits_less_often():
    """A step's loss and its gradient, beside plain autodiff, which also keeps the exponentials."""
    x, w, targets = jnp.ones((256, 16)), jnp.ones((16, 4096)), jnp.zeros(256, jnp.int32)

    def passes(nll):
        step = jax.jit(jax.value_and_grad(lambda x: jnp.sum(nll(x @ w, targets))))
        return step.lower(x).compile().cost_analysis()["bytes accessed"] / (256 * 4096 * 4)

    plain = lambda z, t: jax.nn.logsumexp(z, axis=-1) - jnp.sum(jnp.where(likelihood._hit(z, t), z, 0.0), axis=-1)  # noqa: E731
    assert passes(cross_entropy) < 0.85 * passes(plain)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """So that what is tested comes in parts."""
    monkeypatch.setattr(likelihood, "FEW", 8)


def case(b=3, t=11, d=5, v=13, dtype=jnp.float32):
    """x, weights both ways round, targets, a factor for each token."""
    draw = np.random.default_rng(0)
    x, w, factors = (jnp.asarray(draw.normal(size=s), dtype) for s in ((b, t, d), (d, v), (b, t)))
    return x, (w, w.T), jnp.asarray(draw.integers(0, v, (b, t)), jnp.int32), factors.astype(jnp.float32)


def by_logits(x, weight, targets, axis=0):
    return cross_entropy(x @ (weight.T if axis else weight), targets)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(3, 11), (1, 64), (16, 1), (2, 3), (0, 4), (2, 0)])
def test_a_product_s_likelihoods_are_those_of_its_logits(shape, axis):
    x, weights, targets, factors = case(*shape)
    both = of_product, by_logits
    np.testing.assert_allclose(*(f(x, weights[axis], targets, axis) for f in both), atol=1e-5)
    # Of x alone, as where the weight is frozen, and of both.
    for argnums in (0, (0, 1)):
        loss = lambda x, w, f: jnp.sum(factors * f(x, w, targets, axis))  # noqa: B023, E731
        found, expected = (jax.grad(loss, argnums)(x, weights[axis], f) for f in both)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_half_precision():
    x, (w, _), targets, factors = case(dtype=jnp.bfloat16)
    nll, pull = jax.vjp(lambda x: of_product(x, w, targets), x)
    expected, other = jax.vjp(lambda x: by_logits(x, w, targets), x)
    np.testing.assert_array_equal(nll, expected)
    (dx,), (wanted,) = pull(factors), other(factors)
    assert (nll.dtype, dx.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(dx.astype(jnp.float32), wanted.astype(jnp.float32), rtol=0.02, atol=0.02)


def test_under_vmap():
    x, (w, _), targets, factors = case()
    xs = jnp.stack([x, 2 * x])
    grads = lambda f: jax.vmap(jax.grad(lambda x: jnp.sum(factors * f(x, w, targets))))(xs)  # noqa: E731
    np.testing.assert_allclose(grads(of_product), grads(by_logits), atol=1e-5)


def test_divided_over_a_mesh():
    """Rows over its data axis, the vocabulary over its tensor axis."""
    x, (w, _), targets, factors = case(4, 16, 8, 16)
    grads = lambda x, w, f: jax.value_and_grad(lambda x: jnp.sum(factors * f(x, w, targets)))(x)  # noqa: E731
    expected = grads(x, w, by_logits)
    mesh = sharding.make_mesh(2, 1, 2)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, P(*axes))) for a, axes in ((x, ["data"]), (w, [None, "tensor"]))
        ]
        found = jax.jit(lambda x, w: grads(x, w, of_product))(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_no_array_has_the_logits_of_all_tokens_and_no_product_is_made_twice():
    """In a step, which computes again whatever is not kept."""
    x, (w, _), targets, _ = case(4, 32)

    def step(f):
        return jax.grad(lambda x, w: jnp.sum(between_products(lambda x: f(x, w, targets))(x)))

    ours, plain = (jax.jit(step(f)).lower(x, w).compile().as_text() for f in (of_product, by_logits))
    whole = ["f32[4,32,13]", "f32[128,13]"]
    assert any(shape in plain for shape in whole) and not any(shape in ours for shape in whole)
    products = lambda f: str(jax.make_jaxpr(step(f))(x, w)).count("dot_general[")  # noqa: E731
    assert products(of_product) == likelihood.PARTS * products(by_logits) == likelihood.PARTS * 2


def test_one_part_comes_after_the_other():
    """Whether it is differentiated or not, and however a compiler would rather order them."""
    x, w, targets = jnp.ones((4, 64, 16)), jnp.ones((16, 4096)), jnp.zeros((4, 64), jnp.int32)
    for way in (lambda f: lambda x: f(x, w, targets), lambda f: jax.grad(lambda x: jnp.sum(f(x, w, targets)))):
        ours, plain = (measure.temporaries(jax.jit(way(f)).lower(x).compile()) for f in (of_product, by_logits))
        assert ours < 0.2 * plain


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request):
    return lj.from_config({**MODEL, "tie_word_embeddings": request.param}, seed=1)


def tokens_and_targets():
    draw = np.random.default_rng(0)
    return tuple(jnp.asarray(draw.integers(0, 97, (2, 16)), jnp.int32) for _ in range(2))


def test_a_model_says_what_its_logits_say(base):
    tokens, targets = tokens_and_targets()
    logits = base.apply(base.variables, tokens)
    found = base.apply(base.variables, tokens, targets=targets)
    np.testing.assert_allclose(found, cross_entropy(logits, targets), atol=1e-5)
    at = jnp.asarray([[3, 5], [0, 15]])
    found = base.apply(base.variables, tokens, pool_at=at, targets=targets[:, :2])
    expected = cross_entropy(base.apply(base.variables, tokens, pool_at=at), targets[:, :2])
    np.testing.assert_allclose(found, expected, atol=1e-5)


HEAD = ".*(lm_head|embed).*"


@pytest.mark.parametrize(
    "method", [lj.lora(rank=2, targets=HEAD), lj.lora(rank=2, targets=HEAD, dropout=0.5), lj.full(), lj.lora(rank=2)]
)
def test_an_adapter_of_the_head_learns_as_by_logits(base, method):
    """Whatever it adapts: the head, an embedding that is the head too, all weights, none of these."""
    tokens, targets = tokens_and_targets()
    delta = method.init(jax.random.key(0), base.variables, base.sites)
    moved = jax.tree.map(lambda x: x + 0.1 if jnp.issubdtype(x.dtype, jnp.floating) else x, delta)
    apply, bind = lj.lift(base.apply), lambda d: method.bind(base.variables, d, key=jax.random.key(1))
    ours = lambda d: jnp.sum(apply(bind(d), tokens, targets=targets))  # noqa: E731
    plain = lambda d: jnp.sum(cross_entropy(apply(bind(d), tokens), targets))  # noqa: E731
    (loss, found), (other, expected) = (jax.value_and_grad(f)(moved) for f in (ours, plain))
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found))


def test_a_quantized_head_and_a_cache():
    tokens, targets = tokens_and_targets()
    whole = lj.from_config(MODEL, seed=1)
    base = quantized(whole, "int8", targets="lm_head/kernel")
    found = base.apply(base.variables, tokens, targets=targets)
    np.testing.assert_allclose(found, cross_entropy(base.apply(base.variables, tokens), targets), atol=1e-5)
    assert np.abs(found - whole.apply(whole.variables, tokens, targets=targets)).max() > 1e-4
    found, cache = whole.apply(whole.variables, tokens, targets=targets, cache=whole.init_cache(2, 16))
    np.testing.assert_allclose(found, whole.apply(whole.variables, tokens, targets=targets), atol=1e-5)
    assert int(cache.filled) == 16


def test_targets_that_cannot_be(base):
    tokens, targets = tokens_and_targets()
    with pytest.raises(UserError, match="targets are scored by logits, which output='hidden' leaves out"):
        base.apply(base.variables, tokens, targets=targets, output="hidden")
    with pytest.raises(UserError, match=r"targets have the shape \(2, 15\), but the slots that they follow \(2, 16\)"):
        base.apply(base.variables, tokens, targets=targets[:, 1:])
    with pytest.raises(UserError, match=r"targets have the shape \(2, 16\), but the slots that they follow \(2, 1\)"):
        base.apply(base.variables, tokens, targets=targets, pool_at=jnp.zeros((2, 1), jnp.int32))
    scored = lj.from_config(MODEL, num_labels=2)
    with pytest.raises(UserError, match="a 'llama' model with a task head predicts none; take another task"):
        scored.apply(scored.variables, tokens, targets=targets)
