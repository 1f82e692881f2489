"""Weights as modules read them: Linen's own layers, but no initializer is traced for a weight that is there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors

import lora_jax as lj
from lora_jax.models import linear

X = jnp.ones((2, 3, 4), jnp.bfloat16)
IDS = jnp.asarray([[0, 4, 2]])


def variables(module, x):
    return module.init(jax.random.key(0), x)


@pytest.mark.parametrize(
    "ours, theirs, x",
    [
        (linear.Dense(5), nn.Dense(5), X),
        (linear.Dense(5, use_bias=False), nn.Dense(5, use_bias=False), X),
        (linear.Embed(5, 4), nn.Embed(5, 4), IDS),
    ],
    ids=["dense", "without bias", "embed"],
)
def test_the_program_is_linens(ours, theirs, x):
    given = variables(theirs, x)
    assert jax.tree.map(jnp.shape, variables(ours, x)) == jax.tree.map(jnp.shape, given)
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), given)
        assert str(jax.make_jaxpr(ours.apply)(cast, x)) == str(jax.make_jaxpr(theirs.apply)(cast, x))


def test_a_tied_head_is_linens():
    given = variables(nn.Embed(5, 4), IDS)
    ours, theirs = linear.Embed(5, 4), nn.Embed(5, 4)
    found = [jax.make_jaxpr(lambda v, m=m: m.apply(v, X, method="attend"))(given) for m in (ours, theirs)]
    assert str(found[0]) == str(found[1])


def test_an_initializer_is_traced_where_a_weight_is_missing_and_nowhere_else():
    calls = []

    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * linear.weight(self, "scale", lambda key, shape: calls.append(key) or jnp.ones(shape), (4,))

    given = variables(Scale(), jnp.ones(4))
    assert calls.pop() is not None and not calls
    assert Scale().apply(given, jnp.ones(4)).sum() == 4 and not calls
    with pytest.raises(errors.ScopeParamNotFoundError, match="scale"):
        Scale().apply({"params": {"other": jnp.ones(4)}}, jnp.ones(4))


def test_weights_of_another_config_are_an_error():
    sizes = {
        "model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }  # fmt: skip
    wide, narrow = (lj.models.from_config({**sizes, "intermediate_size": n}) for n in (16, 8))
    with pytest.raises(
        lj.UserError, match=r"'encoder/layer_0/intermediate/kernel' has the shape \(8, 8\), but .* \(8, 16\)"
    ):
        wide.apply(narrow.variables, IDS)
