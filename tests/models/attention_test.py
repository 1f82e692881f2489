"""Attention's own derivative rule against plain autodiff, what it keeps and computes again, and chunks of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import recompute
from lora_jax.dropout import Dropped
from lora_jax.models import attention
from tests.models.layers_test import SMALL

MASKS = [None, (2, 7, 7), (1, 7, 7), (2, 1, 7)]


def written_out(q, k, v, mask, dropout=None):
    """Attention by the textbook, with the keys repeated."""
    b, t, h, d = q.shape
    k, v = (jnp.repeat(x, h // x.shape[1], axis=1) for x in (k, v))
    logits = jnp.einsum("bthd,bhsd->bhts", q, k) * d**-0.5
    logits = logits if mask is None else jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(logits)
    if dropout is not None:  # drawn for the groups of heads that share keys
        probs = dropout(probs.reshape(b, 2, h // 2, t, -1)).reshape(probs.shape)
    return jnp.einsum("bhts,bhsd->bthd", probs, v).reshape(b, t, h * d)


def arrays(dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in ((2, 7, 6, 4), (2, 2, 7, 4), (2, 2, 7, 4))]


def mask_of(shape):
    """Random, with a query that sees nothing where queries differ."""
    mask = np.random.default_rng(1).random(shape) < 0.7
    if shape[1] > 1:
        mask[0, 2] = False
    return jnp.asarray(mask)


def derivatives(attend, qkv, *more):
    loss = lambda *x: jnp.sum(jnp.sin(attend(*x, *more).astype(jnp.float32)))  # noqa: E731
    return jax.value_and_grad(loss, (0, 1, 2))(*qkv)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_the_rule_is_that_of_plain_autodiff(shape, rate):
    mask = None if shape is None else mask_of(shape)
    dropout = Dropped(jax.random.key(0), rate) if rate else None
    given = attention.attend(*arrays(), mask, dropout), written_out(*arrays(), mask, dropout)
    np.testing.assert_allclose(*given, atol=1e-6)
    found, expected = (derivatives(f, arrays(), mask, dropout) for f in (attention.attend, written_out))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6), found, expected)


def test_the_rule_in_bfloat16():
    found = derivatives(attention.attend, arrays("bfloat16"), mask_of((2, 7, 7)))
    assert all(x.dtype == jnp.bfloat16 for x in found[1])
    exact = derivatives(written_out, [x.astype(jnp.float32) for x in arrays("bfloat16")], mask_of((2, 7, 7)))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert np.abs(one.astype(jnp.float32) - other).max() < 0.02 * max(1, np.abs(other).max())


def test_probabilities_are_computed_in_float32():
    """1,023 equal keys: in bfloat16 the probabilities would not add up to one."""
    k, v = jnp.zeros((1, 1, 1023, 4), jnp.bfloat16), jnp.ones((1, 1, 1023, 4), jnp.bfloat16)
    q = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    out, pull = jax.vjp(lambda v: attention.attend(q, k, v, None), v)
    assert (out == 1).all()
    assert (pull(jnp.ones_like(out))[0] == jnp.bfloat16(1 / 1023)).all()


def batched_products(jaxpr):
    """How many products with batch axes a program has, those of inner programs included."""
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(eqn.params) if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    own = sum(
        eqn.primitive.name == "dot_general"
        and eqn.outvars[0].aval.ndim == 5
        and eqn.outvars[0].aval.shape[-2:] == (7, 7)
        for eqn in jaxpr.eqns
    )
    return own + sum(batched_products(getattr(x, "jaxpr", x)) for x in inner)


def test_a_step_computes_the_scores_twice_and_keeps_none():
    """Forward, and once in the backward pass with their cotangents: what a row of the softmax needs is kept."""
    qkv = arrays()
    loss = lambda *x: jnp.sum(attention.attend(*x, None) ** 2)  # noqa: E731
    step = jax.make_jaxpr(jax.grad(recompute.between_products(loss), (0, 1, 2)))(*qkv).jaxpr
    assert batched_products(step) == 3
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*qkv).jaxpr
    assert batched_products(again) == 4, "the measure sees a second forward"
    kept = jax.eval_shape(lambda *x: jax.vjp(loss, *x)[1], *qkv)
    assert max(np.prod(leaf.shape) for leaf in jax.tree.leaves(kept)) == qkv[0].size


@pytest.fixture
def short(monkeypatch):
    """Chunks of 3 queries wherever there are more than 4."""
    monkeypatch.setattr(attention, "LONG", 4)
    monkeypatch.setattr(attention, "CHUNK", 3)


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_attention_in_chunks_is_attention(short, shape):
    mask = None if shape is None else mask_of(shape)
    program = str(jax.make_jaxpr(attention.attend)(*arrays(), mask))
    assert "scan" in program, "no chunks were made"
    np.testing.assert_allclose(attention.attend(*arrays(), mask), written_out(*arrays(), mask), atol=1e-6)
    found, expected = (derivatives(f, arrays(), mask) for f in (attention.attend, written_out))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6), found, expected)


def test_long_attention_stores_no_scores():
    """Twice as long: what grows with the square would take four times the memory."""

    def temporaries(length):
        q, k = jnp.zeros((1, length, 4, 8)), jnp.zeros((1, 4, length, 8))
        step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention.attend(q, k, v, None)), (0, 1, 2)))
        return step.lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.5 * temporaries(1024)


def test_an_adapted_model_attends_in_chunks(monkeypatch):
    base, tokens = lj.from_config(SMALL), jnp.arange(12).reshape(2, 6)
    adapter = lj.lora(rank=2)
    delta = jax.tree.map(lambda x: x + 0.1, adapter.init(jax.random.key(0), base.variables, base.sites))
    loss = lambda d: jnp.sum(jnp.sin(lj.lift(base.apply)(adapter.bind(base.variables, d), tokens)))  # noqa: E731
    expected = jax.value_and_grad(loss)(delta)
    monkeypatch.setattr(attention, "LONG", 4)
    monkeypatch.setattr(attention, "CHUNK", 4)
    assert "scan" in str(jax.make_jaxpr(base.apply)(base.variables, tokens)), "the model took the other path"
    found = jax.value_and_grad(loss)(delta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
