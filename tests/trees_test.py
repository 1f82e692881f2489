"""Trees by path: boxes are no part of a path, nothing outside `params` is touched, a hash tells two bases apart."""

import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from lora_jax import trees


class Block(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


TREE = {
    "params": {"a": {"kernel": jnp.ones((2, 3))}, "b": [jnp.zeros(2), jnp.zeros(1)]},
    "batch_stats": {"m": jnp.ones(4)},
}


def test_paths():
    assert list(trees.flatten(TREE)) == ["a/kernel", "b/0", "b/1"]
    assert list(trees.flatten({"x": Block(1, 2), "params_of_mine": 3})) == ["params_of_mine", "x/kernel", "x/bias"]
    boxed = {"params": {"w": nn.Partitioned(jnp.ones(2), names=("model",))}}
    assert list(trees.flatten(boxed)) == ["w"]
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert sorted(trees.flatten(nnx.state(model))) == ["bias", "kernel"]


def test_a_field_named_value_keeps_its_name_inside_a_path():
    @jax.tree_util.register_dataclass
    @__import__("dataclasses").dataclass
    class Attention:
        query: dict
        value: dict

    tree = {"attention": Attention({"kernel": 1}, {"kernel": 2})}
    assert trees.flatten(tree) == {"attention/query/kernel": 1, "attention/value/kernel": 2}


def test_replace_touches_nothing_else():
    new = trees.replace(TREE, {"b/0": "node", "a/kernel": {"deep": 1}})
    assert new["params"] == {"a": {"kernel": {"deep": 1}}, "b": ["node", TREE["params"]["b"][1]]}
    assert new["batch_stats"] is not None and new["batch_stats"]["m"] is TREE["batch_stats"]["m"]
    assert TREE["params"]["b"][0].shape == (2,), "the given tree is not changed"
    with pytest.raises(KeyError, match="the tree has no"):
        trees.replace(TREE, {"m": 1})
    boxed = trees.replace({"params": {"w": nn.Partitioned(jnp.ones(2), names=("model",))}}, {"w": jnp.zeros(2)})
    assert isinstance(boxed["params"]["w"], nn.Partitioned) and boxed["params"]["w"].names == ("model",)
    whole = trees.replace({"w": (1, 2)}, {"w": 3}, is_leaf=lambda x: isinstance(x, tuple))
    assert whole == {"w": 3}


def test_map_with_path_and_count():
    shown = trees.map_with_path(lambda path, leaf: path, TREE)
    assert shown["params"]["b"] == ["b/0", "b/1"] and shown["batch_stats"]["m"] == ""
    assert trees.count(TREE["params"]) == 9 and trees.count({"a": jnp.float32(1)}) == 1
    assert trees.matches("a/.*", "a/kernel") and not trees.matches("kernel", "a/kernel")


def test_fingerprint():
    base = {"params": {"w": jnp.arange(6.0).reshape(2, 3), "s": jnp.float32(1), "none": jnp.zeros((0, 2))}}
    same = {"stats": jnp.ones(3), "params": dict(reversed(base["params"].items()))}
    assert trees.fingerprint(base) == trees.fingerprint(same), "neither order nor other collections count"
    w = base["params"]["w"]
    others = [w.reshape(3, 2), w.at[0, 0].set(-0.0), w.astype(jnp.bfloat16), w.at[1, 1].add(1e-6), w.T.reshape(2, 3)]
    prints = {trees.fingerprint({"params": base["params"] | {"w": other}}) for other in others}
    assert len(prints) == len(others) and trees.fingerprint(base) not in prints
    assert trees.fingerprint({"params": {"v": w}}) != trees.fingerprint({"params": {"w": w}})
    transposed = np.asfortranarray(np.asarray(w))
    assert trees.leaf_hash(transposed) == trees.leaf_hash(w), "the layout in memory does not count"
    assert trees.leaf_hash(jax.random.key(0)) != trees.leaf_hash(jax.random.key(1))


def test_hash_and_fold_are_the_same_in_every_process():
    assert trees.stable_hash("layers_0/kernel") == 1553852702
    code = "from lora_jax import trees; print(trees.stable_hash('layers_0/kernel'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == trees.stable_hash("layers_0/kernel")
    keys = [trees.fold_path(jax.random.key(0), path) for path in ("a", "b", "a")]
    data = [tuple(np.asarray(jax.random.key_data(k))) for k in keys]
    assert data[0] == data[2] != data[1]
