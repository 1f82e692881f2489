"""NNX modules through split and merge: paths without `value`, lists by index, random state beside the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax import trees
from tests.lift.checks import axes, biases, check, noisy


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(9, 6, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.conv = nnx.Conv(6, 6, (3,), rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=6, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        x = self.norm(self.conv(x))
        return self.dropout(x + self.attention(x))


@pytest.fixture(scope="module")
def net():
    model = Net(nnx.Rngs(0))
    model.eval()
    return model


def test_whole_state(net):
    graph, state = nnx.split(net)
    tokens = jnp.array([[1, 2, 3], [4, 8, 0]])
    heads = {f"attention/{n}/kernel": ((), (0,), (1, 2)) for n in ("query", "key", "value")}
    expect = heads | {
        "attention/out/kernel": ((), (0, 1), (2,)),
        "conv/kernel": ((), (0, 1), (2,)),
        "embed/embedding": ((), (0,), (1,)),
        "layers/0/kernel": ((), (0,), (1,)),
        "layers/1/kernel": ((), (0,), (1,)),
    }
    targets = ".*(kernel|embedding)"
    adapter, delta, sites = check(
        lambda s, t: nnx.merge(graph, s)(t), noisy(state, 0.1), tokens, expect=expect, targets=targets, grad_rtol=None
    )
    assert biases(sites) == {path: path.replace("kernel", "bias") for path in expect if "kernel" in path}
    assert [sites[f"layers/{i}/kernel"].layer for i in range(2)] == [0, 1]
    merged = adapter.merge(state, delta)
    assert type(merged) is type(state) and nnx.merge(graph, merged)(tokens).shape == (2, 3, 6)


def test_parameters_apart_from_the_rest_and_in_training(net):
    net.train()
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    net.eval()
    tokens = jnp.array([[1, 2, 3], [4, 8, 0]])
    _, _, sites = check(lambda p, r, t: nnx.merge(graph, p, r)(t), noisy(params, 0.1), rest, tokens, grad_rtol=None)
    assert "embed/embedding" in axes(sites)


def test_random_keys_in_a_state_have_a_fingerprint(net, tmp_path):
    _, state = nnx.split(net)
    assert any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree_util.tree_leaves(state))
    assert trees.fingerprint(state) == trees.fingerprint(state) != trees.fingerprint(noisy(state))


def test_save_and_load(net, tmp_path):
    graph, state = nnx.split(net)
    tokens = jnp.array([[1, 2, 3]])
    apply = lambda s, t: nnx.merge(graph, s)(t)  # noqa: E731
    adapter = lj.lora(rank=2, targets=".*(query|conv)/kernel")
    delta = noisy(adapter.init(jax.random.key(0), state, lj.find_sites(apply, state, tokens)))
    lj.save(tmp_path, adapter, delta, state)
    again, read = lj.load(tmp_path, state)
    lifted = lj.lift(apply)
    out = [lifted(a.bind(state, d), tokens) for a, d in ((adapter, delta), (again, read))]
    np.testing.assert_array_equal(*out)
