"""Weights as modules read them: Linen's own layers, but no initializer is traced for a weight that is there."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors

import lora_jax as lj
from lora_jax.models import linear

X = jnp.ones((2, 3, 4), jnp.bfloat16)
IDS = jnp.asarray([[0, 4, 2]])
SIZES = {
    "model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 8,
}  # fmt: skip


def variables(module, x):
    return module.init(jax.random.key(0), x)


@pytest.mark.parametrize(
    "ours, theirs, x",
    [
        (linear.Dense(5), nn.Dense(5), X),
        (linear.Dense(5, use_bias=False), nn.Dense(5, use_bias=False), X),
        (linear.Embed(5, 4), nn.Embed(5, 4), IDS),
        (linear.Embed(1, 4), nn.Embed(1, 4), IDS),
    ],
    ids=["dense", "without bias", "embed", "one row"],
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
    boxed = {"params": {"scale": nn.Partitioned(given["params"]["scale"], ("embed",))}}
    assert Scale().apply(boxed, jnp.ones(4)).sum() == 4 and not calls
    with pytest.raises(lj.UserError, match="the variables have no weight 'scale'; are they those of another config?"):
        Scale().apply({"params": {"other": jnp.ones(4)}}, jnp.ones(4))


def test_a_name_that_is_given_twice_is_an_error():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            one, other = (linear.weight(self, "scale", nn.initializers.ones, (4,)) for _ in range(2))
            return x * one + other

    with pytest.raises(errors.NameInUseError):
        variables(Twice(), jnp.ones(4))


def test_families_read_their_weights_by_it():
    folder = Path(linear.__file__).parent
    for file in folder.glob("*.py"):
        found = re.findall(r"nn\.(?:Dense|Embed)\b|self\.param\(", file.read_text(encoding="utf-8"))
        assert not found, f"{file.name} has {found}: take linear.Dense, linear.Embed, linear.weight"


def test_weights_of_another_config_are_an_error():
    wide, narrow = (lj.models.from_config({**SIZES, "intermediate_size": n}) for n in (16, 8))
    with pytest.raises(
        lj.UserError, match=r"'encoder/layer_0/intermediate/kernel' has the shape \(8, 8\), but .* \(8, 16\)"
    ):
        wide.apply(narrow.variables, IDS)
    with pytest.raises(lj.UserError, match=r"have no weight 'encoder/layer_1/"):
        lj.models.from_config({**SIZES, "intermediate_size": 8, "num_hidden_layers": 2}).apply(narrow.variables, IDS)


def test_adapted_weights_want_lift():
    base = lj.models.from_config({**SIZES, "intermediate_size": 8})
    adapter = lj.lora(rank=2)
    bound = adapter.bind(base.variables, adapter.init(jax.random.key(0), base.variables, base.sites))
    with pytest.raises(lj.UserError, match=r"kernel' is a \w+, which this function does not know: call it as lj.lift"):
        base.apply(bound, IDS)
